"""Embedding tables: a lookup with its update against torch's own, their share of a step, a large table's memory."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict

import psutil
import torch

from benchmarks.embedding_cases import BY_HAND, CASES, EXCHANGED, KINDS, METRIC, OURS, Case, contenders
from benchmarks.embedding_worker import Answer, Request
from benchmarks.environment import describe
from benchmarks.harness import Effort, Samples, clock_of, compare, refuse_wrong
from benchmarks.options import positive
from benchmarks.ranks import ask_ranks
from hstu_dist.distributed.config import TableShape
from hstu_dist.distributed.process_group import process_group
from hstu_dist.errors import UserError
from hstu_dist.report.results import Ratio, Results, Row, write
from hstu_dist.report.tables import ratios_table

log = logging.getLogger(__name__)

_DEVICE = torch.device("cpu")
"""All of it is measured there, whatever the machine has."""

_WORKER = "benchmarks.embedding_worker"
_TOLERANCE = 1e-5
_SPEED = 0.5
"""Half the speed of the faster of torch's own ways: at most twice its time."""

_SHARE = 0.05
_MEMORY = 1.3
_GB = 1e9

_RANKS = 2
_LARGEST_ROWS, _STEP_OF_ROWS = 100_000_000, 10_000_000
_WIDTH = 32
_AVAILABLE = 0.6
"""Share of the free memory that a table may take: others work beside us, and their page cache is worth something."""

_LARGE = {"dtype": "fp16", "optimizer": {"kind": "rowwise_adagrad"}}
_EXCHANGE = {
    "row_wise, fp32": {},
    "row_wise, fp16": {"dtype": "fp16"},
    "table_wise, fp32": {"sharding": "table_wise"},
    "data_parallel, fp32": {"sharding": "data_parallel"},
}
"""Tables of 1,000,000 rows on two ranks, all with row-wise Adagrad."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--rows", type=positive, help="of the large table (default: up to 100 million that fit)")


def run(options: argparse.Namespace) -> int:
    """Measures everything, prints the ratios and writes `embedding.json`."""
    rows: list[Row] = []
    ratios: list[Ratio] = []
    for part in (_speeds, _exchanges, _share, _large):
        for found in part(options):
            (rows if isinstance(found, Row) else ratios).append(found)  # type: ignore[arg-type]
    results = Results(
        name="embedding",
        command=options.command,
        rows=tuple(rows),
        ratios=tuple(ratios),
        **asdict(describe(_DEVICE)),
    )
    path = write(results, options.output)
    sys.stdout.write(f"{ratios_table(results)}\n{path}\n")
    return 0


def _speeds(options: argparse.Namespace) -> Iterator[Row | Ratio]:
    """One rank: our tables against torch's embedding with the same optimizer by hand."""
    effort = Effort(budget_seconds=0.1 if options.quick else 6.0, min_rounds=2 if options.quick else 9)
    with process_group("cpu", 60.0):
        for case in CASES[:1] if options.quick else CASES:
            for kind in KINDS[:1] if options.quick else KINDS:
                yield from _compare(case, kind, effort, options)


def _compare(case: Case, kind: str, effort: Effort, options: argparse.Namespace) -> Iterator[Row | Ratio]:
    label = f"{kind}, {case.name}"
    log.info("%s", label)
    checked = refuse_wrong(contenders(case, kind), _TOLERANCE)
    if checked.refused:
        raise UserError(f"{label}: {'; '.join(checked.refused)}", "the messages above name the error")
    steps = {contender.name: contender.steps[METRIC] for contender in checked.sound}
    timings = compare(steps, effort, clock_of(_DEVICE))
    for name, samples in timings.seconds.items():
        yield samples.map(lambda seconds: seconds * 1e3).row(label, name, METRIC, "ms")
    by_hand = timings.fastest(BY_HAND)
    speed = timings.speed_ratio(OURS, by_hand).median
    yield Ratio(case=label, metric=METRIC, a=OURS, b=by_hand, value=speed, target=_SPEED)
    speed = timings.speed_ratio(EXCHANGED, by_hand).median
    yield Ratio(case=label, metric=METRIC, a=EXCHANGED, b=by_hand, value=speed)


def _exchanges(options: argparse.Namespace) -> Iterator[Row | Ratio]:
    """Two ranks: how long a lookup with its update takes by where rows lie."""
    shape, ids = (TableShape(10_000, 64), 500) if options.quick else (TableShape(1_000_000, 64), 20_000)
    label = f"{shape.num_rows:,} rows x {shape.width}, {ids:,} ids a rank, {_RANKS} ranks"
    for name, embedding in _EXCHANGE.items():
        request = Request(
            measure="table",
            steps=3 if options.quick else 15,
            embedding={"optimizer": {"kind": "rowwise_adagrad"}, **embedding},
            rows=shape.num_rows,
            width=shape.width,
            ids=ids,
        )
        answer = _ask(request, _RANKS)
        yield _steps(answer).row(label, name, METRIC, "ms")
        yield Samples((answer.state_bytes / 1e6,)).row(label, name, "weights and state", "MB")


def _share(options: argparse.Namespace) -> Iterator[Row | Ratio]:
    """One rank: what the table takes of a training step on MovieLens-1M."""
    label = "HSTU-large on MovieLens-1M, 1 rank"
    overrides = ["experiment=ml1m_hstu_large", "nproc=1", "trainer.device=cpu"]
    answer = _ask(Request(measure="step", steps=2 if options.quick else 15, overrides=overrides), 1)
    step, tables = Samples(tuple(answer.seconds)), Samples(tuple(answer.tables))
    yield step.map(lambda seconds: seconds * 1e3).row(label, OURS, "step", "ms")
    yield tables.map(lambda seconds: seconds * 1e3).row(label, OURS, METRIC, "ms")
    allowed = _SHARE * step.median / tables.median
    yield Ratio(case=label, metric=METRIC, a=f"{_SHARE:.0%} of the step", b=OURS, value=allowed, target=1.0)


def _large(options: argparse.Namespace) -> Iterator[Row | Ratio]:
    """Two ranks: a table as large as fits beside others, and half of it in fp32, in memory and time."""
    rows = options.rows or (200_000 if options.quick else rows_that_fit(psutil.virtual_memory().available))
    ids = 1_000 if options.quick else 20_000
    for name, embedding, count in (("fp16", _LARGE, rows), ("fp32", _LARGE | {"dtype": "fp32"}, rows // 2)):
        label = f"{count:,} rows x {_WIDTH}, {_RANKS} ranks"
        log.info("%s, %s", label, name)
        request = Request(
            measure="table", steps=3 if options.quick else 15, embedding=embedding, rows=count, width=_WIDTH, ids=ids
        )
        answer = _ask(request, _RANKS)
        if answer.moved < 0.99:
            raise UserError(f"{label}: {answer.moved:.0%} of the rows looked up have moved", "the table does not train")
        yield Samples((answer.state_bytes / _GB,)).row(label, name, "weights and state", "GB")
        yield Samples((answer.peak_bytes / _GB,)).row(label, name, "peak memory", "GB")
        yield Samples((answer.build,)).row(label, name, "build and fill", "s")
        yield _steps(answer).row(label, name, METRIC, "ms")
        limit = _MEMORY * answer.state_bytes / answer.peak_bytes
        yield Ratio(
            case=label,
            metric="peak memory",
            a=f"{_MEMORY} x weights and state",
            b=name,
            value=limit,
            # a small table is mostly libraries
            target=1.0 if rows >= _STEP_OF_ROWS else None,
        )


def rows_that_fit(available_bytes: int) -> int:
    """Rows of the large table: tens of millions that leave enough memory free.

    Args:
        available_bytes: free memory of the machine.

    Raises:
        UserError: not even the smallest number fits.
    """
    row_bytes = 2 * _WIDTH + 4
    rows = int(_AVAILABLE * available_bytes / row_bytes) // _STEP_OF_ROWS * _STEP_OF_ROWS
    if not rows:
        raise UserError(f"large table: {available_bytes / _GB:.1f} GB are free, too little", "give --rows ROWS")
    return min(rows, _LARGEST_ROWS)


def _steps(answer: Answer) -> Samples:
    """Milliseconds; the first steps touch pages and buffers for the first time."""
    return Samples(tuple(seconds * 1e3 for seconds in answer.seconds[len(answer.seconds) // 5 :]))


def _ask(request: Request, ranks: int) -> Answer:
    remedy = "its messages are above; `make data` prepares MovieLens-1M"
    return Answer(**ask_ranks(_WORKER, ranks, request, remedy))
