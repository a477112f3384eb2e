"""Table 2 of the paper: the Transformer, HSTU with softmax and HSTU on the synthetic stream, one pass, several seeds.

A cell is one contender at one seed. Its run resumes and is skipped like any other; what it found is a small file of its
own, and the summary is made from these files alone.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import environment, study
from benchmarks.appendix_c_oracle import best_hit_rates
from benchmarks.options import positive
from benchmarks.study import StudyOptions
from benchmarks.study_cells import Run, Summary, load_current, means, over_seeds, row, seeds_of, write_run
from hstu_dist.config import RunConfig, compose
from hstu_dist.data.config import AppendixCConfig, DataSetConfig
from hstu_dist.data.prepare import prepare
from hstu_dist.data.split import Split
from hstu_dist.errors import ExitCode
from hstu_dist.report.results import Ratio, Results, Row, load, write
from launch.__main__ import main as launch

NAME = "appendix_c"
CONTENDERS: Mapping[str, str] = {
    "transformer": "appendix_c_transformer",
    "hstu, softmax": "appendix_c_softmax",
    "hstu": "appendix_c",
}
"""Experiments of conf/experiment, from the paper's worst to its best; none has a relative bias."""
POPULARITY, PUBLISHED, ORACLE = "popularity", "published", "oracle"
_ORDER = (("hstu", "hstu, softmax"), ("hstu, softmax", "transformer"), ("hstu", "transformer"))
_METRICS = ("hr@10", "hr@50")
_RECORDS = 100_000
"""A tenth of the paper's stream: nine cells of the whole one take more than three hours on two cores."""
_WHOLE = 1_000_000
STREAM = f"{NAME}/stream"
"""The cell that tells how fast the stream is made."""
_RECORDS_PER_SECOND = 50_000
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
class Study(StudyOptions):
    """What all cells share."""

    def overrides(self, cell: Cell) -> list[str]:
        """Settings of a cell's run."""
        experiment = f"experiment={CONTENDERS[cell.contender]}"
        return [experiment, f"seed={cell.seed}", f"output={self.runs}", f"name={cell.stem}", *self.settings]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument(
        "--records", type=positive, default=_RECORDS, help="of the stream; the paper has 1000000 (default: %(default)s)"
    )
    study.add_options(parser, NAME, nproc=1)


def run(options: argparse.Namespace) -> int:
    """Prepares the stream, runs the cells that are missing, seed by seed, and writes the summary of all that exist."""
    shared = _study(options)
    cells = [Cell(contender, seed) for seed in options.seeds for contender in CONTENDERS]
    data = compose(shared.overrides(cells[0])).prepared
    assert isinstance(data, AppendixCConfig)
    _time_stream(data, shared)
    prepare(data)
    return study.run_cells(cells, lambda cell: _run_cell(shared, cell), lambda: write_summary(shared))


def _study(options: argparse.Namespace) -> Study:
    records = 400 if options.quick and options.records == _RECORDS else options.records
    place = options.output / f"{NAME}_data" if options.quick else Path("data") / f"{NAME}_{records}"
    tiny = [*_TINY, *_TINY_DATA] if options.quick else []
    return Study.of(NAME, options, [f"data.num_records={records}", f"data.path={place}", *tiny])


def _time_stream(data: AppendixCConfig, shared: Study) -> None:
    """Writes the cell that says how fast the stream is made, unless it exists: made once more, and removed.

    All but the smallest studies make the paper's whole stream, beside which what a preparation takes once is little.
    """
    if data.num_records >= _RECORDS:
        data = replace(data, num_records=_WHOLE)
    case = _case(data)
    if (shared.output / f"{STREAM}.json").exists() and load(STREAM, shared.output).rows[0].case == case:
        return
    shared.runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=shared.runs) as folder:
        started = time.perf_counter()
        prepare(replace(data, path=str(Path(folder) / "stream")))
        seconds = time.perf_counter() - started
    here = environment.describe(torch.device("cpu"))
    rate = row(case, "prepare", "records", data.num_records / seconds, "1/s")
    write(Results(name=STREAM, command=shared.command, rows=(rate,), **vars(here)), shared.output)


def _run_cell(shared: Study, cell: Cell) -> int:
    """Exit code of the launch that did not finish, or FINISHED."""
    config = compose(shared.overrides(cell))
    if load_current(cell.name, shared.output, config) is not None:
        log.info("%s: already measured", cell.name)
        return ExitCode.FINISHED
    log.info("%s", cell.name)
    code = launch(shared.overrides(cell))
    if code == ExitCode.FINISHED:
        write_cell(cell, Run.read(config), shared)
    return code


def write_cell(cell: Cell, run: Run, shared: Study) -> None:
    """Writes the cell's file."""
    write_run(cell.name, run, _rows(cell.contender, run), shared.output, shared.command)


def write_summary(shared: Study) -> Results:
    """Writes means over the seeds of all cells whose settings are the present ones, at least one of which exists."""
    cells = [Cell(one, seed) for one in CONTENDERS for seed in seeds_of(Cell(one, 0).name, shared.output)]
    configs = {cell: compose(shared.overrides(cell)) for cell in cells}
    found = [load_current(cell.name, shared.output, config) for cell, config in configs.items()]
    current = [results for results in found if results is not None]
    if (shared.output / f"{STREAM}.json").exists():
        current.insert(0, load(STREAM, shared.output))
    rows = [
        *means(one for results in current for one in results.rows),
        *_best(next(iter(configs.values()))),
        *_published(shared),
    ]
    return Summary(NAME, rows, _ratios(rows)).write(current, shared.output, shared.command)


def _case(data: DataSetConfig) -> str:
    return f"{getattr(data, 'num_records', 0):,} records of {getattr(data, 'record_length', 0)}"


def _rows(contender: str, run: Run) -> Iterator[Row]:
    case, speed = _case(run.config.prepared), run.result["speed"]
    facts = {
        **run.result["test"],
        "training TFLOP": speed["training_flops"] / 1e12,
        "dense parameters": run.result["dense_parameters"],
    }
    for metric, value in facts.items():
        yield row(case, contender, metric, value)
    yield row(case, contender, "train_seconds", speed["train_seconds"], "s")
    for metric, value in run.result["popularity"].items():
        yield row(case, POPULARITY, metric, value)


def _best(config: RunConfig) -> Iterator[Row]:
    """Of who knows the laws of the stream; over all held-out records."""
    data, cut = config.prepared, config.record_split
    assert isinstance(data, AppendixCConfig)
    assert cut is not None
    for cutoff, value in best_hit_rates(data, range(*cut.bounds(data.num_records, Split.TEST)), (10, 50)).items():
        yield row(_case(data), ORACLE, f"hr@{cutoff}", value)


def _published(shared: Study) -> Iterator[Row]:
    """The paper's figures: the whole stream, models of a size that it does not give."""
    for contender in CONTENDERS:
        for metric, value in compose(shared.overrides(Cell(contender, 1))).published.items():
            yield row(PUBLISHED, contender, metric, value)


def _ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    """The paper's order: above 1 it holds; and how fast the stream is made."""
    for one in rows:
        if one.metric == "records":
            limit = f"{_RECORDS_PER_SECOND:,}/s"
            yield Ratio(
                case=one.case,
                metric="records/s",
                a="prepare",
                b=limit,
                value=one.value / _RECORDS_PER_SECOND,
                target=1.0,
            )
    values = {(one.case, one.contender, one.metric): one for one in rows if one.case != PUBLISHED}
    for (case, contender, metric), ours in values.items():
        for better, worse in _ORDER:
            theirs = values.get((case, worse, metric))
            if contender == better and theirs is not None and metric in _METRICS and theirs.value:
                named, ratio = over_seeds(metric, ours.n, theirs.n), ours.value / theirs.value
                yield Ratio(case=case, metric=named, a=better, b=worse, value=ratio, target=1.0)
