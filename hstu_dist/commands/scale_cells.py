"""Runs of a sweep as points of a scaling study, and the compute of a run before it starts; no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hstu_dist.config import RunConfig, compose, difference, load, to_dict
from hstu_dist.data.config import AppendixCConfig, DataSetConfig, LoaderConfig
from hstu_dist.data.dataset import Ints, SequenceDataset
from hstu_dist.data.split import Split, part_lengths, recent_rows
from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically
from hstu_dist.models.config import RetrievalConfig
from hstu_dist.run_folder import RunFolder, commits_of
from hstu_dist.scaling.compute import trained_lengths, training_flops
from hstu_dist.scaling.points import Point

CELLS_FILE = "cells.json"
"""In the folder of a sweep: what was asked of each of its cells, run → overrides."""

_NOT_THE_CELL = {"name", "output", "nproc", "cluster", "plan", "published", "experiment"}
_NOT_THE_DATA = {"max_length", "window", "stochastic_length"}


def training_compute(config: RunConfig) -> int | None:
    """FLOPs of training a retrieval run to its last epoch, Stochastic Length included, from its settings.

    Returns:
        None where that cannot be told before: ranking, streams, splits by time.

    Raises:
        UserError: the data set, whose lengths decide, is not prepared.
    """
    data, task, trainer = config.data, config.task, config.trainer
    if isinstance(data, StreamConfig) or not isinstance(task, RetrievalConfig) or task.split == "time":
        return None
    model, loss = config.retrieval
    epochs, split, cut = trainer.stop_epoch or trainer.epochs or 1, Split(trainer.train_on), config.record_split
    drawn = data.stochastic_length is not None or trainer.emission is not None
    if isinstance(data, AppendixCConfig) and cut is not None and not drawn:
        # without the stream: those of clusters have too many records to lay out
        start, end = cut.bounds(data.num_records, split)
        known = {min(data.max_length, data.record_length - 1): (end - start) * epochs}
        return training_flops(model, loss, data.num_items, known)
    lengths, num_items = _lengths(config.prepared)
    parts = part_lengths(lengths, split) if cut is None else cut.parts(lengths, split)
    loader = LoaderConfig(
        split=split,
        global_batch_size=trainer.global_batch_size,
        max_length=data.max_length,
        seed=config.seed,
        stochastic_length=data.stochastic_length,
        emission=trainer.emission,
    )
    trained = trained_lengths(recent_rows(parts, data.max_length), loader, epochs)
    return training_flops(model, loss, num_items, trained)


def _lengths(data: DataSetConfig) -> tuple[Ints, int]:
    """[S] events of every sequence, and the number of items."""
    if isinstance(data, AppendixCConfig):
        return np.full(data.num_records, data.record_length, dtype=np.int64), data.num_items
    dataset = SequenceDataset.open(data.path)
    return dataset.lengths, dataset.num_items


def remember_cells(folder: Path, cells: dict[str, Sequence[str]]) -> None:
    """Writes down what was asked of each cell of a sweep; cells of earlier sweeps into the same folder stay."""
    file = folder / CELLS_FILE
    known = json.loads(file.read_text()) if file.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(known | {run: list(words) for run, words in cells.items()}, indent=1).encode())


def read_points(folder: Path) -> tuple[list[Point], list[str]]:
    """Finished runs of a sweep, and a line about each cell that cannot be used.

    Args:
        folder: of the runs.

    Raises:
        UserError: there are no runs.
    """
    asked: dict[str, list[str]] = {}
    if (folder / CELLS_FILE).exists():
        asked = json.loads((folder / CELLS_FILE).read_text())
    runs = sorted({*asked, *(file.parent.name for file in folder.glob("*/config.yaml"))})
    if not runs:
        raise UserError(f"{folder}: got no runs", "give the folder of a sweep, such as runs/scaling")
    points, excluded = [], []
    for run in runs:
        reason = _unusable(RunFolder(folder / run), asked.get(run))
        if reason is None:
            points.append(_point(RunFolder(folder / run)))
        else:
            excluded.append(f"{run}: excluded, {reason}")
    return points, excluded


def _unusable(run: RunFolder, words: list[str] | None) -> str | None:
    """Why a cell cannot be used; None: it can."""
    if not run.config_file.exists() or run.result() is None:
        return "has not finished"
    config = load(run.config_file)
    if run.finished(config.trainer.last_epoch) is None:
        return f"ended after {(run.result() or {}).get('epochs')} of {config.trainer.last_epoch} epochs"
    changed = [] if words is None else difference(config, compose(words))
    return f"its settings were changed under the result ({'; '.join(changed[:3])})" if changed else None


def _point(run: RunFolder) -> Point:
    config, result = load(run.config_file), run.result()
    assert result is not None
    environment = run.environment()
    values = to_dict(config)
    settings = {name: value for name, value in values.items() if name not in _NOT_THE_CELL}
    speed, known = result["speed"], run.data()
    # a copy of prepared data elsewhere is the same; a stream is what its path has
    excluded = _NOT_THE_DATA | (set() if isinstance(config.data, StreamConfig) else {"path"})
    return Point(
        run=config.name,
        family=config.experiment or config.model.kind,
        settings=_text(settings),
        data=_text({name: value for name, value in values["data"].items() if name not in excluded}),
        made_from="" if known is None else known.made_from,
        seed=config.seed,
        compute=float(speed["training_flops"]),
        parameters=int(result["dense_parameters"]),
        tokens=float(speed["tokens_per_second"] * speed["train_seconds"]),
        seconds=float(speed["train_seconds"]),
        metrics={name: float(value) for name, value in result["test"].items()},
        date=str(environment.get("date", "")),
        commit=_commit_of(environment),
    )


def _commit_of(environment: dict[str, Any]) -> str:
    """As dirty where the run saw several: none of them alone gave the result."""
    began, *others = commits_of(environment)
    return f"{began.removesuffix('-dirty')}-dirty" if others else began


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))
