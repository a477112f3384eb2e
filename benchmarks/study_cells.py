"""Cells of a study: what is measured once, a run or two, in a file of its own that knows its settings."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
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
from hstu_dist.run_folder import RunFolder, commits_of
from hstu_dist.train.metrics_file import read_metrics

CONFIGURATION = "configuration"
"""Entry of a cell's versions that has its settings."""


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
        return cls(config, result, folder.environment(), read_metrics(folder.path))


def load_current(name: str, folder: Path, config: RunConfig) -> Results | None:
    """A cell's file, if it exists and was measured with these settings; what does not matter may differ."""
    if not (folder / f"{name}.json").exists():
        return None
    measured = load(name, folder)
    try:
        # a setting that did not exist then gets its default; one that exists no more is refused
        then = from_dict(json.loads(measured.versions[CONFIGURATION]))
    except (UserError, KeyError):
        return None
    same_length = then.trainer.epochs == config.trainer.epochs and then.trainer.stop_epoch == config.trainer.stop_epoch
    # where runs and data lie makes no difference
    placed = replace(then, name=config.name, data=replace(then.data, path=config.data.path))
    return measured if same_length and not difference(placed, config) else None


def seeds_of(cell: str, folder: Path) -> list[int]:
    """Seeds of the files that differ from a cell's, NAME_seedN, in their seed alone, whatever their settings."""
    stem = cell.rpartition("seed")[0]
    seeds = [path.stem.rpartition("seed")[2] for path in folder.glob(f"{stem}seed*.json")]
    return sorted(int(seed) for seed in seeds if seed.isdecimal())


def write_run(name: str, run: Run, rows: Iterable[Row], folder: Path, command: str) -> None:
    """Writes a cell's file.

    Args:
        name: of the cell.
        run: whose settings and commit count.
        rows: what was found.
        folder: of result files.
        command: what to type to measure it again.
    """
    config = run.config
    here = environment.describe(torch.device(_device_of(config)))
    measured = Results(
        name=name,
        command=command,
        date=here.date,
        commit=_commit_of(run, here.commit),
        device=here.device,
        threads=config.trainer.threads or cores_per_rank(config.nproc),
        versions={**here.versions, CONFIGURATION: json.dumps(to_dict(config), separators=(",", ":"))},
        rows=tuple(rows),
    )
    write(measured, folder)


@dataclass(frozen=True)
class Summary:
    """What is made of cells.

    Attributes:
        name: of the study.
        rows: in the order of the tables.
        ratios: of the rows.
    """

    name: str
    rows: Sequence[Row]
    ratios: Iterable[Ratio]

    def write(self, cells: Iterable[Results], folder: Path, command: str) -> Results:
        """Writes it as of the newest of its cells, so that writing it again changes nothing.

        Args:
            cells: what it was made of, at least one.
            folder: of result files.
            command: what to type to measure them again.
        """
        newest = max(cells, key=lambda results: results.date)
        versions = {name: version for name, version in newest.versions.items() if name != CONFIGURATION}
        own = {"name": self.name, "command": command, "rows": tuple(self.rows), "ratios": tuple(self.ratios)}
        whole = replace(newest, versions=versions, **own)  # type: ignore[arg-type]
        write(whole, folder)
        return whole


def row(case: str, contender: str, metric: str, value: float, unit: str = "1") -> Row:
    """A figure of one run."""
    return Row(case=case, contender=contender, metric=metric, value=value, unit=unit, n=1, q25=value, q75=value)


def means(rows: Iterable[Row]) -> Iterator[Row]:
    """Means and quartiles over rows that differ in their value alone: those of several seeds."""
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for one in rows:
        found.setdefault((one.case, one.contender, one.metric, one.unit), []).append(one.value)
    for (case, contender, metric, unit), values in found.items():
        yield replace(Samples(tuple(values)).row(case, contender, metric, unit), value=statistics.fmean(values))


def over_seeds(metric: str, n: int, against: int | None = None) -> str:
    """A metric's name in a ratio of means: over n seeds, and over how many the other one is, if that may differ."""
    if against not in (None, n):
        return f"{metric}, means of {n} and {against} seeds"
    return f"{metric}, {'1 seed' if n == 1 else f'mean of {n} seeds'}"


def _device_of(config: RunConfig) -> str:
    """Cpu or cuda, where a run computes."""
    wanted = config.trainer.device
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _commit_of(run: Run, now: str) -> str:
    """The commit that trained; of the present one we know whether more than result files was changed."""
    trained = commits_of(run.environment)
    clean = list(dict.fromkeys(commit.removesuffix("-dirty") for commit in trained))
    if clean == [now.removesuffix("+changes")]:
        return now
    return clean[0] + ("+changes" if trained != clean or len(clean) > 1 else "")
