"""`export`: a run's best checkpoint as packages that need nothing but torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hstu_dist.commands.trained import encoder_config, read_weights, run_of, tower_of
from hstu_dist.data.vocabulary import Vocabulary
from hstu_dist.errors import UserError
from hstu_dist.inference.config import ExportConfig
from hstu_dist.inference.export import Bounds, exported, write_package


def export_run(run: Path | None, overrides: Sequence[str], settings: ExportConfig, say: Callable[[str], None]) -> None:
    """Writes the packages, the item table and their description.

    Args:
        run: folder of the run, or None.
        overrides: the run's settings, if there is no folder.
        settings: of the command.
        say: prints a line for the user.

    Raises:
        UserError: the run cannot be used, the output holds something else, or there is no compiler.
    """
    config, folder = run_of(run, overrides)
    items = Vocabulary.items(settings.prepared_data or config.data.path)
    weights = read_weights(folder, config.model.width)
    if len(items) != weights.table_VD.shape[0]:
        raise UserError(
            f"{config.data.path}: has {len(items)} items, the run was trained on {weights.table_VD.shape[0]}",
            "set prepared_data=FOLDER to the prepared data that the run was trained on",
        )
    # the backend that is nothing but PyTorch
    model = replace(encoder_config(config), backend="blocked")
    tower = tower_of(model, weights, torch.device("cpu"))
    bounds = Bounds(users=settings.max_users, history=model.max_length, candidates=settings.max_candidates)
    description = {
        "run": folder.path.name,
        "step": weights.step,
        "width": model.width,
        "largest": {"B": bounds.users, "N": bounds.history, "M": bounds.candidates},
        "items": items.raw.to_pylist(),
    }
    write_package(Path(settings.output), exported(tower, bounds), weights.table_VD, description, settings.compile)
    say(f"{settings.output}: step {weights.step} of {folder.path}, {len(items)} items")
