"""Cell files of the ranking study, one per contender and seed, and the summary that is made from them."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.harness import Samples
from benchmarks.ml1m_cells import CONFIGURATION, Run, commit_of, device_of, matches
from hstu_dist.config import RunConfig, to_dict
from hstu_dist.machine import cores_per_rank
from hstu_dist.report.results import Ratio, Results, Row, load, write

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
    return matches(_load(cell, folder), config)


def write_cell(cell: Cell, run: Run, folder: Path, command: str) -> None:
    """Writes the cell's file.

    Args:
        cell: which.
        run: its finished run.
        folder: of result files.
        command: what to type to measure it again.
    """
    config = run.config
    here = environment.describe(torch.device(device_of(config)))
    configuration = json.dumps(to_dict(config), separators=(",", ":"))
    measured = Results(
        name=cell.name,
        command=command,
        date=here.date,
        commit=commit_of(run, here.commit),
        device=here.device,
        threads=config.trainer.threads or cores_per_rank(config.nproc),
        versions={**here.versions, CONFIGURATION: configuration},
        rows=tuple(_rows(cell.contender, run)),
    )
    write(measured, folder)


def write_summary(cells: Sequence[Cell], folder: Path, command: str, config_of: Callable[[Cell], RunConfig]) -> Results:
    """Writes means over the seeds of all cells whose settings are the present ones, at least one of which exists.

    Args:
        cells: in the order of the tables.
        folder: of result files.
        command: what to type to measure it again.
        config_of: present settings of a cell.
    """
    found = {cell: _load(cell, folder) for cell in cells}
    whole = {cell: r for cell, r in found.items() if r is not None and matches(r, config_of(cell))}
    rows = list(_means([row for results in whole.values() for row in results.rows]))
    newest = max(whole.values(), key=lambda results: results.date)
    versions = {name: version for name, version in newest.versions.items() if name != CONFIGURATION}
    ratios = tuple(_ratios(rows))
    summary = replace(newest, name=NAME, command=command, versions=versions, rows=tuple(rows), ratios=ratios)
    write(summary, folder)
    return summary


def _load(cell: Cell, folder: Path) -> Results | None:
    return load(cell.name, folder) if (folder / f"{cell.name}.json").exists() else None


def _rows(contender: str, run: Run) -> Iterator[Row]:
    result = run.result
    facts = {
        **result["test"],
        "best epoch": result["best_epoch"],
        "training TFLOP an epoch": result["speed"]["training_flops"] / result["epochs"] / 1e12,
        "dense parameters": result["dense_parameters"],
    }
    for metric, value in facts.items():
        yield _row(contender, metric, value)
    for metric, value in result["popularity"].items():
        yield _row(AVERAGES, metric, value)


def _row(contender: str, metric: str, value: float) -> Row:
    return Row(case=CASE, contender=contender, metric=metric, value=value, unit="1", n=1, q25=value, q75=value)


def _means(rows: Sequence[Row]) -> Iterator[Row]:
    """Means and quartiles over the seeds."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row.contender, row.metric), []).append(row.value)
    for (contender, metric), values in found.items():
        yield replace(Samples(tuple(values)).row(CASE, contender, metric, "1"), value=statistics.fmean(values))


def _ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    """HSTU against each baseline; above 1 it is better."""
    values = {(row.contender, row.metric): row for row in rows}
    for baseline in _BASELINES:
        for metric, more in _MORE_IS_BETTER.items():
            ours, theirs = values.get((_GR, metric)), values.get((baseline, metric))
            if ours is None or theirs is None:
                continue
            better, worse = (ours, theirs) if more else (theirs, ours)
            seeds = "1 seed" if ours.n == 1 else f"mean of {ours.n} seeds"
            yield Ratio(
                case=CASE,
                metric=f"{metric}{'' if more else ', inverted'}, {seeds}",
                a=_GR,
                b=baseline,
                value=better.value / worse.value,
                target=None if metric == "like/gauc" else 1.0,
            )
