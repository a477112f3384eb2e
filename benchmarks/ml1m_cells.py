"""Cell files of the MovieLens-1M study, one per experiment and seed, and the summary that is made from them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.harness import Samples
from hstu_dist.config import RunConfig, difference, from_dict, to_dict
from hstu_dist.errors import UserError
from hstu_dist.machine import cores_per_rank
from hstu_dist.report.results import Ratio, Results, Row, load, write
from hstu_dist.run_folder import RunFolder
from hstu_dist.train.metrics_file import read_metrics

NAME = "ml1m"

CHOSEN = "validation-chosen"
"""Test metrics at the best validation epoch."""
REFIT = "refit"
"""Test metrics after as many epochs on the training and validation events."""
REFERENCE = "reference protocol (best test epoch)"
"""What the public code reports: trained on all but the last event, the best of all readings of the test split."""
HELD_OUT = "best test epoch, validation events held out"
"""The same reading of the run that was trained without the validation events."""
POPULARITY, PUBLISHED = "popularity", "published"

TARGETS: Mapping[str, Mapping[str, float]] = {
    "sasrec": {"hr@10": 0.285},
    "hstu": {"hr@10": 0.309},
    "hstu_large": {"hr@10": 0.329, "ndcg@10": 0.189},
    "best": {"hr@10": 0.345},
}
"""What the project holds each experiment to, in mean over the seeds."""

_CURVE = ("ndcg@10", "hr@10")
CONFIGURATION = "configuration"
"""Entry of a cell's versions that has its settings."""


@dataclass(frozen=True)
class Cell:
    """One experiment at one seed."""

    experiment: str
    seed: int

    @property
    def name(self) -> str:
        """Of its result file."""
        return f"{NAME}/{self.experiment}_seed{self.seed}"


@dataclass(frozen=True)
class Run:
    """What a finished run left in its folder.

    Attributes:
        config: its settings.
        result: its result.json.
        environment: its environment.json.
        metrics: lines of its log, oldest first.
    """

    config: RunConfig
    result: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]

    @classmethod
    def read(cls, config: RunConfig) -> Run:
        """From the folder of a finished run.

        Raises:
            UserError: it ended at another epoch than these settings ask for.
        """
        folder = RunFolder(config.run_dir)
        result = folder.result()
        assert result is not None
        wanted = config.trainer.last_epoch
        if result["epochs"] > wanted or (result["epochs"] < wanted and not result["stopped_early"]):
            raise UserError(
                f"run folder {folder.path}: holds a run of {result['epochs']} epochs, expected {wanted}",
                "remove the folder and give the same command again",
            )
        environment_file = folder.path / "environment.json"
        return cls(config, result, json.loads(environment_file.read_text()), read_metrics(folder.path))


def is_current(cell: Cell, folder: Path, config: RunConfig) -> bool:
    """Whether the cell's file exists and was measured with these settings; what does not matter may differ."""
    return matches(_load(cell, folder), config)


def write_cell(cell: Cell, runs: tuple[Run, Run], folder: Path, command: str) -> None:
    """Writes the cell's file.

    Args:
        cell: which.
        runs: the one that chose the epoch, and the refit.
        folder: of result files.
        command: what to type to measure it again.
    """
    chosen, refit = runs
    config = chosen.config
    here = environment.describe(torch.device(device_of(config)))
    configuration = json.dumps(to_dict(config), separators=(",", ":"))
    measured = Results(
        name=cell.name,
        command=command,
        date=here.date,
        commit=commit_of(chosen, here.commit),
        device=here.device,
        threads=config.trainer.threads or cores_per_rank(config.nproc),
        versions={**here.versions, CONFIGURATION: configuration},
        rows=tuple(_rows(cell.experiment, chosen, refit)),
    )
    write(measured, folder)


def write_summary(
    experiments: Sequence[str], folder: Path, command: str, config_of: Callable[[Cell], RunConfig]
) -> Results:
    """Writes means over the seeds of all cells whose settings are the present ones.

    Args:
        experiments: in the order of the tables.
        folder: of result files.
        command: what to type to measure it again.
        config_of: present settings of a cell.

    Raises:
        UserError: there is no such cell.
    """
    cells = {experiment: list(_cells(experiment, folder, config_of)) for experiment in experiments}
    everything = [results for found in cells.values() for results in found]
    if not everything:
        raise UserError(f"{folder / NAME}: got no cell of the present settings", "run python -m benchmarks ml1m")
    rows: list[Row] = []
    for experiment, found in cells.items():
        if found:
            published = config_of(Cell(experiment, 1)).published
            rows += [*_means(experiment, found), *_single(experiment, PUBLISHED, published)]
    # from the cells, so that writing it again changes nothing
    newest = max(everything, key=lambda results: results.date)
    versions = {name: version for name, version in newest.versions.items() if name != CONFIGURATION}
    summary = replace(
        newest, name=NAME, command=command, versions=versions, rows=tuple(rows), ratios=tuple(_ratios(rows))
    )
    write(summary, folder)
    return summary


def _cells(experiment: str, folder: Path, config_of: Callable[[Cell], RunConfig]) -> Iterator[Results]:
    prefix = f"{experiment}_seed"
    seeds = [path.stem.removeprefix(prefix) for path in (folder / NAME).glob(f"{prefix}*.json")]
    for seed in sorted(int(seed) for seed in seeds if seed.isdecimal()):
        cell = Cell(experiment, seed)
        found = _load(cell, folder)
        if found is not None and matches(found, config_of(cell)):
            yield found


def _load(cell: Cell, folder: Path) -> Results | None:
    return load(cell.name, folder) if (folder / f"{cell.name}.json").exists() else None


def matches(measured: Results | None, config: RunConfig) -> bool:
    """Whether a cell was measured with these settings; what does not matter may differ."""
    if measured is None:
        return False
    try:
        # a setting that did not exist then gets its default; one that exists no more is refused
        then = from_dict(json.loads(measured.versions[CONFIGURATION]))
    except (UserError, KeyError):
        return False
    same_length = then.trainer.epochs == config.trainer.epochs and then.trainer.stop_epoch == config.trainer.stop_epoch
    # where runs and data lie makes no difference
    placed = replace(then, name=config.name, data=replace(then.data, path=config.data.path))
    return same_length and not difference(placed, config)


def _rows(experiment: str, chosen: Run, refit: Run) -> Iterator[Row]:
    for contender, run in ((CHOSEN, chosen), (REFIT, refit)):
        facts = {**run.result["test"], "epochs": run.result["epochs"], "ranks": run.result["world_size"]}
        if "best_epoch" in run.result:
            facts["best epoch"] = run.result["best_epoch"]
        yield from _single(experiment, contender, facts)
        speed = run.result["speed"]
        for metric in ("train_seconds", "evaluation_seconds"):
            yield _row(experiment, contender, metric, speed[metric], "s")
    for contender, run in ((HELD_OUT, chosen), (REFERENCE, refit)):
        tracked = run.result.get("reference_protocol")
        if tracked:
            yield from _single(experiment, contender, {**tracked["test"], "best epoch": tracked["best_epoch"]})
    yield from _single(experiment, POPULARITY, refit.result["popularity"])
    yield from _curve(chosen)


def _curve(run: Run) -> Iterator[Row]:
    """Validation and mean logged loss of every epoch."""
    steps = run.result["steps"] // run.result["epochs"]
    losses: dict[int, list[float]] = {}
    for line in run.metrics:
        epoch = math.ceil(line["step"] / steps)
        if "train/loss" in line:
            losses.setdefault(epoch, []).append(line["train/loss"])
        for metric in _CURVE:
            if f"validation/{metric}" in line:
                yield _row(f"epoch {epoch}", "validation", metric, line[f"validation/{metric}"])
    for epoch, values in losses.items():
        yield _row(f"epoch {epoch}", "training", "loss", statistics.fmean(values))


def _single(case: str, contender: str, values: Mapping[str, float]) -> Iterator[Row]:
    for metric, value in values.items():
        yield _row(case, contender, metric, value)


def _row(case: str, contender: str, metric: str, value: float, unit: str = "1") -> Row:
    return Row(case=case, contender=contender, metric=metric, value=value, unit=unit, n=1, q25=value, q75=value)


def _means(experiment: str, cells: Sequence[Results]) -> Iterator[Row]:
    """Means and quartiles over the seeds, for whatever all cells have of the experiment itself."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for cell in cells:
        for row in cell.rows:
            if row.case == experiment:
                found.setdefault((row.contender, row.metric, row.unit), []).append(row.value)
    for (contender, metric, unit), values in found.items():
        samples = Samples(tuple(values))
        yield replace(samples.row(experiment, contender, metric, unit), value=statistics.fmean(values))


def _ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    """HR and NDCG are ratios by themselves: what was hit over what could be hit."""
    for row in rows:
        target = TARGETS.get(row.case, {}).get(row.metric)
        if target is not None and row.contender in (CHOSEN, REFIT, REFERENCE):
            seeds = "1 seed" if row.n == 1 else f"mean of {row.n} seeds"
            yield Ratio(
                case=row.case,
                metric=f"{row.metric}, {seeds}",
                a=row.contender,
                b="perfect",
                value=row.value,
                # reading the test split many times is no achievement
                target=None if row.contender == REFERENCE else target,
            )


def device_of(config: RunConfig) -> str:
    """Cpu or cuda, where a run computes."""
    wanted = config.trainer.device
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def commit_of(run: Run, now: str) -> str:
    """The commit that trained; of the present one we know whether more than result files was changed."""
    trained = str(run.environment["commit"])
    if trained.removesuffix("-dirty") == now.removesuffix("+changes"):
        return now
    return trained.replace("-dirty", "+changes")
