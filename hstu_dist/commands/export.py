"""`export`: a run's best checkpoint as packages that need nothing of hstu_dist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hstu_dist.commands.trained import encoder_config, inputs_of, read_weights, run_of, tower_of
from hstu_dist.commands.use import Words
from hstu_dist.errors import UserError
from hstu_dist.inference.config import ExportConfig
from hstu_dist.inference.export import Bounds, exported, write_package
from hstu_dist.models.tower import Tower


def export_run(words: Words[ExportConfig], say: Callable[[str], None]) -> None:
    """Writes the packages, the item table and their description.

    Args:
        words: which run, and the settings of the command.
        say: prints a line for the user.

    Raises:
        UserError: the run cannot be used, the output holds something else, or there is no compiler.
    """
    settings = words.settings
    config, folder = run_of(words.run, words.overrides)
    model = encoder_config(config)
    inputs = inputs_of(config, folder, settings.prepared_data)
    weights = read_weights(folder, model.width)
    # the backend that is nothing but PyTorch
    tower = tower_of(config, inputs, weights, torch.device("cpu"), backend="blocked")
    if not isinstance(tower, Tower):
        raise UserError(f"run {folder.path}: was trained to rank", "name a run with task=retrieval")
    bounds = Bounds(users=settings.max_users, history=model.max_length, candidates=settings.max_candidates)
    description = {
        "run": folder.path.name,
        "step": weights.step,
        "width": model.width,
        "largest": {"B": bounds.users, "N": bounds.history, "M": bounds.candidates},
        "items": inputs.items.decode(np.arange(len(inputs.items))),
    }
    write_package(Path(settings.output), exported(tower, bounds), weights.table_VD, description, settings.compile)
    say(f"{settings.output}: step {weights.step} of {folder.path}, {len(inputs.items)} items")
