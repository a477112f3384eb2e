"""Table 2 of the paper: the Transformer, HSTU with softmax and HSTU on the synthetic stream, one pass, several seeds.

A cell is one contender at one seed. Its run resumes and is skipped like any other; what it found is a small file of its
own, and the summary is made from these files alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.harness import Samples
from benchmarks.ml1m_cells import CONFIGURATION, Run, commit_of, device_of, matches
from benchmarks.options import positive
from hstu_dist.config import RunConfig, compose, to_dict
from hstu_dist.data.prepare import prepare
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.machine import cores_per_rank
from hstu_dist.report.results import Ratio, Results, Row, load, write
from launch.__main__ import main as launch

NAME = "appendix_c"
CONTENDERS: Mapping[str, str] = {
    "transformer": "appendix_c_transformer",
    "hstu, softmax": "appendix_c_softmax",
    "hstu": "appendix_c",
}
"""Experiments of conf/experiment, from the paper's worst to its best; none has a relative bias."""
POPULARITY, PUBLISHED = "popularity", "published"
_ORDER = (("hstu", "hstu, softmax"), ("hstu, softmax", "transformer"), ("hstu", "transformer"))
_METRICS = ("hr@10", "hr@50")
_RECORDS = 500_000
"""Half of the paper's stream: nine cells of the whole one take more than three hours on two cores."""
PARTIAL = ("records",)
_TINY = ("model.width=8", "trainer.global_batch_size=16", "trainer.logging.tensorboard=false", "trainer.device=cpu")
_TINY_DATA = ("data.record_length=16", "data.max_length=15", "data.num_items=60", "data.num_categories=6")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """One contender at one seed."""

    contender: str
    seed: int

    @property
    def stem(self) -> str:
        """Of its run folder and its file."""
        return f"{CONTENDERS[self.contender].removeprefix('appendix_c').strip('_') or 'hstu'}_seed{self.seed}"

    @property
    def name(self) -> str:
        """Of its result file."""
        return f"{NAME}/{self.stem}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all cells share.

    Attributes:
        settings: overrides of every run.
        runs: folder of run folders.
        output: folder of result files.
        command: what to type to repeat the study.
    """

    settings: tuple[str, ...]
    runs: Path
    output: Path
    command: str

    def overrides(self, cell: Cell) -> list[str]:
        """Settings of a cell's run."""
        experiment = f"experiment={CONTENDERS[cell.contender]}"
        return [experiment, f"seed={cell.seed}", f"output={self.runs}", f"name={cell.stem}", *self.settings]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument(
        "--records", type=positive, default=_RECORDS, help="of the stream; the paper has 1000000 (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=positive, default=[1, 2, 3], metavar="SEED", help="seeds of each (default: 1 2 3)"
    )
    parser.add_argument("--nproc", type=positive, default=1, help="ranks of a run (default: %(default)s)")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/NAME; with --quick beside output)")


def run(options: argparse.Namespace) -> int:
    """Prepares the stream, runs the cells that are missing, seed by seed, and writes the summary of all that exist."""
    study = _study(options)
    cells = [Cell(contender, seed) for seed in options.seeds for contender in CONTENDERS]
    prepare(compose(study.overrides(cells[0])).prepared)
    failed: list[str] = []
    for cell in cells:
        code = _run_cell(study, cell)
        if code >= 128:
            # a signal stopped it: whoever sent it wants no further cell
            return code
        if code != ExitCode.FINISHED:
            failed.append(cell.name)
        else:
            write_summary(cells, study)
    if failed:
        raise UserError(f"not finished: {', '.join(failed)}", "see the errors above; the same command goes on")
    return 0


def _study(options: argparse.Namespace) -> Study:
    records = 400 if options.quick and options.records == _RECORDS else options.records
    runs = options.runs or (options.output / "appendix_c_runs" if options.quick else Path("runs") / NAME)
    place = options.output / "appendix_c_data" if options.quick else Path("data") / f"{NAME}_{records}"
    settings = [f"nproc={options.nproc}", f"trainer.device={options.device.type}", f"data.num_records={records}"]
    settings += [f"data.path={place}"]
    if options.threads is not None:
        settings.append(f"trainer.threads={options.threads}")
    settings += [*_TINY, *_TINY_DATA] if options.quick else []
    return Study(settings=tuple(settings), runs=runs, output=options.output, command=options.command)


def _run_cell(study: Study, cell: Cell) -> int:
    """Exit code of the launch that did not finish, or FINISHED."""
    config = compose(study.overrides(cell))
    if matches(_load(cell, study.output), config):
        log.info("%s: already measured", cell.name)
        return ExitCode.FINISHED
    log.info("%s", cell.name)
    code = launch(study.overrides(cell))
    if code == ExitCode.FINISHED:
        write_cell(cell, Run.read(config), study)
    return code


def write_cell(cell: Cell, run: Run, study: Study) -> None:
    """Writes the cell's file."""
    config = run.config
    here = environment.describe(torch.device(device_of(config)))
    measured = Results(
        name=cell.name,
        command=study.command,
        date=here.date,
        commit=commit_of(run, here.commit),
        device=here.device,
        threads=config.trainer.threads or cores_per_rank(config.nproc),
        versions={**here.versions, CONFIGURATION: json.dumps(to_dict(config), separators=(",", ":"))},
        rows=tuple(_rows(cell.contender, run)),
    )
    write(measured, study.output)


def write_summary(cells: Sequence[Cell], study: Study) -> Results:
    """Writes means over the seeds of all cells whose settings are the present ones, at least one of which exists."""
    configs = {cell: compose(study.overrides(cell)) for cell in cells}
    found = {cell: _load(cell, study.output) for cell in cells}
    whole = [r for cell, r in found.items() if r is not None and matches(r, configs[cell])]
    rows = [*_means([row for results in whole for row in results.rows]), *_published(configs)]
    newest = max(whole, key=lambda results: results.date)
    versions = {name: version for name, version in newest.versions.items() if name != CONFIGURATION}
    summary = replace(
        newest, name=NAME, command=study.command, versions=versions, rows=tuple(rows), ratios=tuple(_ratios(rows))
    )
    write(summary, study.output)
    return summary


def _load(cell: Cell, folder: Path) -> Results | None:
    return load(cell.name, folder) if (folder / f"{cell.name}.json").exists() else None


def _case(config: RunConfig) -> str:
    data = config.prepared
    return f"{getattr(data, 'num_records', 0):,} records of {getattr(data, 'record_length', 0)}"


def _rows(contender: str, run: Run) -> Iterator[Row]:
    case, speed = _case(run.config), run.result["speed"]
    facts = {
        **run.result["test"],
        "training TFLOP": speed["training_flops"] / 1e12,
        "dense parameters": run.result["dense_parameters"],
    }
    for metric, value in facts.items():
        yield _row(case, contender, metric, value)
    yield _row(case, contender, "train_seconds", speed["train_seconds"], "s")
    for metric, value in run.result["popularity"].items():
        yield _row(case, POPULARITY, metric, value)


def _published(configs: Mapping[Cell, RunConfig]) -> Iterator[Row]:
    """The paper's figures: the whole stream, models of a size that it does not give."""
    for contender in CONTENDERS:
        config = next(config for cell, config in configs.items() if cell.contender == contender)
        for metric, value in config.published.items():
            yield _row(PUBLISHED, contender, metric, value)


def _row(case: str, contender: str, metric: str, value: float, unit: str = "1") -> Row:
    return Row(case=case, contender=contender, metric=metric, value=value, unit=unit, n=1, q25=value, q75=value)


def _means(rows: Sequence[Row]) -> Iterator[Row]:
    """Means and quartiles over the seeds."""
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row.case, row.contender, row.metric, row.unit), []).append(row.value)
    for (case, contender, metric, unit), values in found.items():
        yield replace(Samples(tuple(values)).row(case, contender, metric, unit), value=statistics.fmean(values))


def _ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    """The paper's order: above 1 it holds."""
    values = {(row.case, row.contender, row.metric): row for row in rows if row.case != PUBLISHED}
    for (case, contender, metric), ours in values.items():
        for better, worse in _ORDER:
            theirs = values.get((case, worse, metric))
            if contender == better and theirs is not None and metric in _METRICS and theirs.value:
                seeds = "1 seed" if ours.n == 1 else f"mean of {ours.n} seeds"
                ratio = ours.value / theirs.value
                yield Ratio(case=case, metric=f"{metric}, {seeds}", a=better, b=worse, value=ratio, target=1.0)
