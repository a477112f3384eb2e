"""Cell files of the MovieLens-1M study, one per experiment and seed, and the summary that is made from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study_cells import Run, Summary, load_current, means, over_seeds, row, seeds_of, write_run
from hstu_dist.config import RunConfig
from hstu_dist.errors import UserError
from hstu_dist.report.results import Ratio, Results, Row

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


@dataclass(frozen=True)
class Cell:
    """One experiment at one seed."""

    experiment: str
    seed: int

    @property
    def name(self) -> str:
        """Of its result file."""
        return f"{NAME}/{self.experiment}_seed{self.seed}"


def is_current(cell: Cell, folder: Path, config: RunConfig) -> bool:
    """Whether the cell's file exists and was measured with these settings; what does not matter may differ."""
    return load_current(cell.name, folder, config) is not None


def write_cell(cell: Cell, runs: tuple[Run, Run], folder: Path, command: str) -> None:
    """Writes the cell's file.

    Args:
        cell: which.
        runs: the one that chose the epoch, and the refit.
        folder: of result files.
        command: what to type to measure it again.
    """
    chosen, refit = runs
    write_run(cell.name, chosen, _rows(cell.experiment, chosen, refit), folder, command)


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
            # of each cell what it has of the experiment itself
            own = [one for results in found for one in results.rows if one.case == experiment]
            rows += [*means(own), *_single(experiment, PUBLISHED, published)]
    return Summary(NAME, rows, _ratios(rows)).write(everything, folder, command)


def _cells(experiment: str, folder: Path, config_of: Callable[[Cell], RunConfig]) -> Iterator[Results]:
    for seed in seeds_of(Cell(experiment, 0).name, folder):
        cell = Cell(experiment, seed)
        found = load_current(cell.name, folder, config_of(cell))
        if found is not None:
            yield found


def _rows(experiment: str, chosen: Run, refit: Run) -> Iterator[Row]:
    for contender, run in ((CHOSEN, chosen), (REFIT, refit)):
        facts = {**run.result["test"], "epochs": run.result["epochs"], "ranks": run.result["world_size"]}
        if "best_epoch" in run.result:
            facts["best epoch"] = run.result["best_epoch"]
        yield from _single(experiment, contender, facts)
        speed = run.result["speed"]
        for metric in ("train_seconds", "evaluation_seconds"):
            yield row(experiment, contender, metric, speed[metric], "s")
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
                yield row(f"epoch {epoch}", "validation", metric, line[f"validation/{metric}"])
    for epoch, values in losses.items():
        yield row(f"epoch {epoch}", "training", "loss", statistics.fmean(values))


def _single(case: str, contender: str, values: Mapping[str, float]) -> Iterator[Row]:
    for metric, value in values.items():
        yield row(case, contender, metric, value)


def _ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    """HR and NDCG are ratios by themselves: what was hit over what could be hit."""
    for one in rows:
        target = TARGETS.get(one.case, {}).get(one.metric)
        if target is not None and one.contender in (CHOSEN, REFIT, REFERENCE):
            yield Ratio(
                case=one.case,
                metric=over_seeds(one.metric, one.n),
                a=one.contender,
                b="perfect",
                value=one.value,
                # reading the test split many times is no achievement
                target=None if one.contender == REFERENCE else target,
            )
