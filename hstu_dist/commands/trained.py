"""A trained run as a model on one process, without any ranks: its best checkpoint, and the names of what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu_dist.actions import action_fields
from hstu_dist.checkpoint.manifest import check_file, read_manifest, step_of
from hstu_dist.checkpoint.offline import read_whole
from hstu_dist.commands.checkpoint import TABLE, TOWER, find, table_of, weight_records
from hstu_dist.commands.ranking_model import ranking_parts, ranking_shape
from hstu_dist.config import RunConfig, compose, load
from hstu_dist.data.contextual import contextual_values
from hstu_dist.data.identity import ITEMS, DataIdentity, feature
from hstu_dist.data.schema import load_manifest
from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.data.vocabulary import Vocabulary
from hstu_dist.distributed.config import ITEM
from hstu_dist.errors import UserError
from hstu_dist.inference.cache import StateCache
from hstu_dist.inference.config import ModelUse
from hstu_dist.inference.inputs import ActionInput, Inputs
from hstu_dist.inference.ranking import RankingModel
from hstu_dist.inference.requests import ValueIndex
from hstu_dist.inference.retrieval import RetrievalModel
from hstu_dist.machine import keep_freed_memory
from hstu_dist.models.config import AttentionBackendName, EncoderConfig, HSTUConfig, RankingConfig, TransformerConfig
from hstu_dist.models.ranking import RankingTower
from hstu_dist.models.ranking_shape import largest_number
from hstu_dist.models.tower import Tower
from hstu_dist.ops import backends
from hstu_dist.run_folder import RunFolder

_SAME_DATA = "set prepared_data=FOLDER to the prepared data that the run was trained on"


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
    if isinstance(config.data, StreamConfig) and config.data.item_ids == "hashed":
        raise UserError(
            f"run {run}: its items have rows by data.item_ids=hashed, which this command cannot follow",
            "train with item_ids=dense to score, retrieve, serve or export",
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
    # the others do not matter: they may be damaged, or removed at any moment by training that goes on
    paths = find(folder.path)
    path, manifest = paths[-1], read_manifest(paths[-1])
    best = next((other for other in paths if step_of(other) == manifest.state.get("best_step")), path)
    if best != path:
        path, manifest = best, read_manifest(best)
    for name, record in manifest.files.items():
        check_file(path, name, record)
    tensors = {name: read_whole(path, record) for name, record in weight_records(manifest).items()}
    (table,) = (tensor for name, tensor in tensors.items() if name.startswith(TABLE) and table_of(name) == ITEM)
    tower = {name.removeprefix(TOWER): tensor for name, tensor in tensors.items() if name.startswith(TOWER)}
    return Weights(manifest.state["step"], tower, table[:, :width].float().contiguous())


@dataclass(frozen=True)
class Trained:
    """A model and what it reads.

    Attributes:
        model: what scores.
        inputs: what it reads of a request.
        step: of its checkpoint.
        run: its folder.
    """

    model: RetrievalModel | RankingModel
    inputs: Inputs
    step: int
    run: Path

    @property
    def retrieval(self) -> RetrievalModel:
        """The model, if it retrieves.

        Raises:
            UserError: it was trained to rank.
        """
        if not isinstance(self.model, RetrievalModel):
            raise UserError(
                f"run {self.run}: was trained to rank, so it scores candidates and retrieves none",
                "use `score` or `serve`, or name a run with task=retrieval",
            )
        return self.model


def load_trained(config: RunConfig, folder: RunFolder, use: ModelUse, cache: StateCache | None = None) -> Trained:
    """Loads a run's best checkpoint and the vocabulary of what it reads.

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
    inputs = inputs_of(config, folder, use.prepared_data)
    weights = read_weights(folder, config.model.width)
    tower, table_VD = tower_of(config, inputs, weights, device), weights.table_VD.to(device)
    model: RetrievalModel | RankingModel
    if isinstance(tower, RankingTower):
        model = RankingModel(tower, table_VD, ranking_parts(config)[1].heads, cache)
    else:
        model = RetrievalModel(tower, table_VD, encoder_config(config).max_length, cache)
    return Trained(model, inputs, weights.step, folder.path)


def inputs_of(config: RunConfig, folder: RunFolder, prepared_data: str | None) -> Inputs:
    """What the model of a run reads.

    Args:
        config: of the run.
        folder: of the run.
        prepared_data: folder that names items, users and features; None: that of the run.

    Raises:
        UserError: the folder is missing or damaged, has not what the model reads, or has other values than the run
            was trained on.
    """
    data, known = Path(prepared_data or config.data.path), folder.data()
    events = config.data.max_length
    if isinstance(config.data, StreamConfig) and prepared_data is None:
        # dense ids, which stand for themselves: `run_of` lets no others through
        return Inputs(items=ValueIndex(Vocabulary.numbers(config.data.num_items).raw), max_events=events)
    raw_items = Vocabulary.items(data).raw
    _check_values(known, data, ITEMS, raw_items)
    items = ValueIndex(raw_items)
    if not isinstance(config.task, RankingConfig):
        return Inputs(items=items, max_events=events)
    manifest, task = load_manifest(data), config.task
    actions = {
        field.name: ActionInput(field, largest_number(field, task.action_levels))
        for field in action_fields(manifest.action_fields)
    }
    values = contextual_values(data, manifest, task.contextual)
    for name, raw in values.items():
        _check_values(known, data, feature(name), raw)
    return Inputs(
        items=items,
        # a candidate is an event, too
        max_events=events - 1,
        needs_history=False,
        actions=actions,
        contextual={name: ValueIndex(raw) for name, raw in values.items()},
    )


def _check_values(known: DataIdentity | None, data: Path, name: str, values: Any) -> None:
    """Whether ids stand for what they stood for in training, where the run left a record of it."""
    if known is not None and not known.are_values_of(name, values):
        raise UserError(
            f"data {data}: its {name} ({len(values)}) are not those that the run was trained on", _SAME_DATA
        )


def encoder_config(config: RunConfig) -> EncoderConfig:
    """The run's model, if it encodes sequences.

    Raises:
        UserError: it does not.
    """
    model = config.model
    if not isinstance(model, HSTUConfig | TransformerConfig):
        raise UserError(f"model: got {model.kind}, expected one that encodes sequences", "name a run of another model")
    return model


def tower_of(
    config: RunConfig, inputs: Inputs, weights: Weights, device: torch.device, backend: AttentionBackendName = "auto"
) -> Tower | RankingTower:
    """The tower of a run with a checkpoint's weights, which will not be trained.

    Args:
        config: of the run.
        inputs: what its model reads.
        weights: of the checkpoint.
        device: where it computes.
        backend: what it computes attention with; auto: as in the run's settings, where the device has that.

    Raises:
        UserError: the weights are of another model or of other data.
    """
    rows = weights.table_VD.shape[0]
    if len(inputs.items) != rows:
        raise UserError(f"data: has {len(inputs.items)} items, the run was trained on {rows}", _SAME_DATA)
    encoder = encoder_config(config)
    if backend != "auto":
        encoder = replace(encoder, backend=backend)
    elif encoder.backend != "auto" and encoder.backend not in backends.available(device):
        # it was chosen for the machine that trained
        encoder = replace(encoder, backend="auto")
    tower: Tower | RankingTower
    if isinstance(config.task, RankingConfig):
        sizes = [len(index) for index in inputs.contextual.values()]
        fields = [column.field for column in inputs.actions.values()]
        tower = RankingTower(encoder, ranking_shape(config, rows, fields, sizes), device)
    else:
        tower = Tower(encoder, device)
    try:
        # strict: a tower of other settings must not pass
        tower.load_state_dict(weights.tower)
    except RuntimeError as error:
        first = str(error).partition("\n")[2].strip().partition("\n")[0]
        raise UserError(
            f"checkpoint of step {weights.step}: does not fit the run's settings and data ({first[:200]})", _SAME_DATA
        ) from error
    return tower.requires_grad_(False).eval()


def _device(name: Any) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: got cuda, but this machine has no usable CUDA device", "use device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
