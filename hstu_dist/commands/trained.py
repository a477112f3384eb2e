"""A trained run as a model on one process: its best checkpoint and the vocabulary of its items, without any ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu_dist.checkpoint.manifest import check_file, read_manifest
from hstu_dist.checkpoint.offline import read_whole
from hstu_dist.commands.checkpoint import TABLE, TOWER, find, table_of, weight_records
from hstu_dist.config import RunConfig, compose, load
from hstu_dist.data.vocabulary import Vocabulary
from hstu_dist.distributed.config import ITEM
from hstu_dist.errors import UserError
from hstu_dist.inference.cache import StateCache
from hstu_dist.inference.config import ModelUse
from hstu_dist.inference.requests import ItemIndex
from hstu_dist.inference.retrieval import RetrievalModel
from hstu_dist.machine import keep_freed_memory
from hstu_dist.models.config import HSTUConfig, TransformerConfig
from hstu_dist.models.tower import Tower
from hstu_dist.run_folder import RunFolder


@dataclass(frozen=True)
class Weights:
    """A checkpoint's weights on the CPU.

    Attributes:
        step: of the checkpoint.
        tower: state dictionary of the tower.
        table_VD: item table, without the columns that storage pads it with.
    """

    step: int
    tower: dict[str, Tensor]
    table_VD: Tensor


def run_of(run: Path | None, overrides: Sequence[str]) -> tuple[RunConfig, RunFolder]:
    """Settings and folder of a run.

    Args:
        run: its folder; None: where the overrides say.
        overrides: `experiment=NAME` and the like, if there is no folder.

    Raises:
        UserError: both or neither are given, or there is no such run.
    """
    if run is None:
        if not overrides:
            raise UserError("run: got none", "give the run's folder, or its settings, such as experiment=ml1m")
        config = compose(overrides)
        run = config.run_dir
    elif overrides:
        raise UserError(f"{run} and {overrides[0]}: a run's folder knows its settings", "give one of the two")
    folder = RunFolder(run)
    if not folder.config_file.exists():
        raise UserError(f"run {run}: got no {folder.config_file.name}", "train it first, or name another folder")
    # what it was trained with, not what the same command would mean today
    config = load(folder.config_file)
    kind = config.embedding.vocabulary.kind
    if kind != "static":
        raise UserError(
            f"run {run}: its items have rows by embedding.vocabulary.kind={kind}, which this command cannot follow",
            "export rows and ids with `python -m hstu_dist checkpoint export`, or train with kind=static",
        )
    return config, folder


def read_weights(folder: RunFolder, width: int) -> Weights:
    """Weights of the best checkpoint that is still there, or the newest if none was validated.

    Args:
        folder: of the run.
        width: D of the model.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    checkpoints = {read.state["step"]: (path, read) for path in find(folder.path) if (read := read_manifest(path))}
    newest = max(checkpoints)
    best = checkpoints[newest][1].state.get("best_step", -1)
    step = best if best in checkpoints else newest
    path, manifest = checkpoints[step]
    for name, record in manifest.files.items():
        check_file(path, name, record)
    tensors = {name: read_whole(path, record) for name, record in weight_records(manifest).items()}
    (table,) = (tensor for name, tensor in tensors.items() if name.startswith(TABLE) and table_of(name) == ITEM)
    tower = {name.removeprefix(TOWER): tensor for name, tensor in tensors.items() if name.startswith(TOWER)}
    return Weights(step, tower, table[:, :width].float().contiguous())


@dataclass(frozen=True)
class Trained:
    """A model and the names of its items.

    Attributes:
        model: what scores.
        items: from the users' ids to the model's and back.
        step: of its checkpoint.
        run: its folder.
    """

    model: RetrievalModel
    items: ItemIndex
    step: int
    run: Path


def load_trained(config: RunConfig, folder: RunFolder, use: ModelUse, cache: StateCache | None = None) -> Trained:
    """Loads a run's best checkpoint and its vocabulary.

    Args:
        config: of the run.
        folder: of the run.
        use: device, threads, and where the vocabulary is.
        cache: where histories are kept between requests.

    Raises:
        UserError: one of them is missing or damaged, or they do not belong together.
    """
    keep_freed_memory()
    if use.threads is not None:
        torch.set_num_threads(use.threads)
    device = _device(use.device)
    data = use.prepared_data or config.data.path
    items = ItemIndex(Vocabulary.items(data))
    weights = read_weights(folder, config.model.width)
    if len(items) != weights.table_VD.shape[0]:
        raise UserError(
            f"{data}: has {len(items)} items, the run was trained on {weights.table_VD.shape[0]}",
            "set prepared_data=FOLDER to the prepared data that the run was trained on",
        )
    encoder = encoder_config(config)
    tower = tower_of(encoder, weights, device)
    model = RetrievalModel(tower, weights.table_VD.to(device), encoder.max_length, cache)
    return Trained(model, items, weights.step, folder.path)


def encoder_config(config: RunConfig) -> HSTUConfig | TransformerConfig:
    """The run's model, if it encodes sequences.

    Raises:
        UserError: it does not.
    """
    model = config.model
    if not isinstance(model, HSTUConfig | TransformerConfig):
        raise UserError(f"model: got {model.kind}, expected one that encodes sequences", "name a retrieval run")
    return model


def tower_of(model: HSTUConfig | TransformerConfig, weights: Weights, device: torch.device) -> Tower:
    """The tower with a checkpoint's weights, which will not be trained."""
    tower = Tower(model, device)
    try:
        # strict: a tower of other settings, or of another task, must not pass
        tower.load_state_dict(weights.tower)
    except RuntimeError as error:
        first = str(error).partition("\n")[2].strip().partition("\n")[0]
        raise UserError(
            f"checkpoint of step {weights.step}: is not that of a retrieval tower ({first[:200]})",
            "name a run that was trained for retrieval with this version",
        ) from error
    return tower.requires_grad_(False).eval()


def _device(name: Any) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: got cuda, but this machine has no usable CUDA device", "use device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
