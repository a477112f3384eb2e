"""Cell files of the ranking study, one per contender and seed, and the summary that is made from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study_cells import Run, Summary, load_current, means, over_seeds, row, seeds_of, write_run
from hstu_dist.config import RunConfig
from hstu_dist.report.results import Ratio, Results, Row

NAME = "ranking"
CASE = "ml1m"
AVERAGES = "item averages"

_GR, _BASELINES = "hstu", ("dlrm", "dlrm_cross")
_MORE_IS_BETTER = {"like/auc": True, "like/gauc": True, "like/ne": False}


@dataclass(frozen=True)
class Cell:
    """One contender at one seed."""

    contender: str
    seed: int

    @property
    def stem(self) -> str:
        """Of its run folder and its file."""
        return f"{re.sub('[^a-z0-9]+', '_', self.contender)}_seed{self.seed}"

    @property
    def name(self) -> str:
        """Of its result file."""
        return f"{NAME}/{self.stem}"


def is_current(cell: Cell, folder: Path, config: RunConfig) -> bool:
    """Whether the cell's file exists and was measured with these settings; what does not matter may differ."""
    return load_current(cell.name, folder, config) is not None


def write_cell(cell: Cell, run: Run, folder: Path, command: str) -> None:
    """Writes the cell's file.

    Args:
        cell: which.
        run: its finished run.
        folder: of result files.
        command: what to type to measure it again.
    """
    write_run(cell.name, run, _rows(cell.contender, run), folder, command)


def write_summary(
    contenders: Sequence[str], folder: Path, command: str, config_of: Callable[[Cell], RunConfig]
) -> Results:
    """Writes means over the seeds of all cells whose settings are the present ones, at least one of which exists.

    Args:
        contenders: in the order of the tables.
        folder: of result files.
        command: what to type to measure it again.
        config_of: present settings of a cell.
    """
    cells = [Cell(contender, seed) for contender in contenders for seed in seeds_of(Cell(contender, 0).name, folder)]
    found = [load_current(cell.name, folder, config_of(cell)) for cell in cells]
    current = [results for results in found if results is not None]
    rows = list(means(one for results in current for one in results.rows))
    return Summary(NAME, rows, _ratios(rows)).write(current, folder, command)


def _rows(contender: str, run: Run) -> Iterator[Row]:
    result = run.result
    facts = {
        **result["test"],
        "best epoch": result["best_epoch"],
        "training TFLOP an epoch": result["speed"]["training_flops"] / result["epochs"] / 1e12,
        "dense parameters": result["dense_parameters"],
    }
    for metric, value in facts.items():
        yield row(CASE, contender, metric, value)
    for metric, value in result["popularity"].items():
        yield row(CASE, AVERAGES, metric, value)


def _ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    """HSTU against each baseline; above 1 it is better."""
    values = {(one.contender, one.metric): one for one in rows}
    for baseline in _BASELINES:
        for metric, more in _MORE_IS_BETTER.items():
            ours, theirs = values.get((_GR, metric)), values.get((baseline, metric))
            if ours is None or theirs is None:
                continue
            better, worse = (ours, theirs) if more else (theirs, ours)
            yield Ratio(
                case=CASE,
                metric=over_seeds(f"{metric}{'' if more else ', inverted'}", ours.n, theirs.n),
                a=_GR,
                b=baseline,
                value=better.value / worse.value,
                target=None if metric == "like/gauc" else 1.0,
            )
