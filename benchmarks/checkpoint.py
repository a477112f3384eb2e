"""Checkpoints of two ranks: how long training stands still for one, and saving and loading against the disk itself."""

from __future__ import annotations

import argparse
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.checkpoint_worker import Answer, Request
from benchmarks.environment import ROOT, describe
from benchmarks.harness import Samples
from benchmarks.options import positive
from benchmarks.ranks import ask_ranks
from hstu_dist.report.results import Ratio, Results, Row, write

log = logging.getLogger(__name__)

_RANKS = 2
_WIDTH = 64
# with AdamW's two moments: 1.0 GB
_ROWS = 1_300_000
_FIGURES = {
    "plain write": ("plain files", "write"),
    "synchronous save": ("synchronous", "write"),
    "asynchronous save": ("asynchronous", "write"),
    "stall": ("asynchronous", "stall"),
    "plain read": ("plain files", "read"),
    "load": ("checkpoint", "read"),
}
"""What the ranks measured, as contender and metric."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--rounds", type=positive, default=6, help="rounds after an untimed one (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs", help="on the disk to measure (default: runs/)")


def run(options: argparse.Namespace) -> int:
    """Measures and writes the result file."""
    answer = _measure(options)
    label = f"{answer.bytes / 1e9:.2f} GB on {_RANKS} ranks"
    results = Results(
        name="checkpoint",
        command=options.command,
        rows=tuple(rows_of(label, answer)),
        ratios=tuple(ratios_of(label, answer)),
        **asdict(describe(options.device)),
    )
    for row in results.rows:
        log.info("%s, %s: %.3f %s (%.3f to %.3f)", row.contender, row.metric, row.value, row.unit, row.q25, row.q75)
    for ratio in results.ratios:
        log.info("%s: %s / %s = %.2f, target %s", ratio.metric, ratio.a, ratio.b, ratio.value, ratio.target)
    log.info("written to %s", write(results, options.output))
    return 0


def rows_of(label: str, answer: Answer) -> list[Row]:
    """Seconds of everything that was measured."""
    return [
        Samples(tuple(answer.seconds[name])).row(label, contender, metric, "s")
        for name, (contender, metric) in _FIGURES.items()
    ]


def ratios_of(label: str, answer: Answer) -> list[Ratio]:
    """The targets; each ratio is the median over the rounds."""
    stall, write_rate, read_rate = (
        _median_ratio(answer, over, under)
        for over, under in (
            ("synchronous save", "stall"),
            ("plain write", "synchronous save"),
            ("plain read", "load"),
        )
    )
    return [
        Ratio(case=label, metric="stall", a="10% of a synchronous save", b="stall", value=stall / 10, target=1.0),
        Ratio(case=label, metric="write rate", a="synchronous", b="plain files", value=write_rate, target=0.5),
        Ratio(case=label, metric="read rate", a="checkpoint", b="plain files", value=read_rate, target=0.5),
    ]


def _median_ratio(answer: Answer, over: str, under: str) -> float:
    pairs = zip(answer.seconds[over], answer.seconds[under], strict=True)
    return Samples(tuple(a / b for a, b in pairs)).median


def _measure(options: argparse.Namespace) -> Answer:
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="checkpoint-benchmark-") as folder:
        rows, rounds = (20_000, 1) if options.quick else (_ROWS, options.rounds)
        request = Request(folder=folder, rows=rows, width=_WIDTH, rounds=rounds)
        return Answer(**ask_ranks("benchmarks.checkpoint_worker", _RANKS, request, "see the messages above"))
