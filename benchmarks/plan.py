"""The capacity planner: how long a plan takes, and how well it predicts memory of real ranks and towers."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks.environment import ROOT, describe
from benchmarks.harness import Samples
from benchmarks.plan_ranks import held, job_of, saved_bytes
from hstu_dist.errors import UserError
from hstu_dist.models.activations import activation_bytes
from hstu_dist.models.config import HSTUConfig, TransformerConfig
from hstu_dist.plan.memory import memory_of
from hstu_dist.report.results import Ratio, Results, Row, write
from hstu_dist.report.tables import ratios_table
from tests.distributed.ranks import run_ranks

log = logging.getLogger(__name__)

_CONTENDER = "hstu_dist"
_MEGABYTE = 1e6
_SECONDS = {256: 10.0, 4096: 60.0}
"""What a plan for so many ranks may take."""

_PEAK_MB = 1000.0
_RESIDENT, _ACTIVATIONS = 0.95, 0.85
"""Least agreement of predicted and measured bytes: the smaller over the larger."""

_RUNS = 5
_ITEMS = 200_001
_RANKS = (1, 2, 4)
_KINDS = ("rowwise_adagrad", "adamw")
_SEQUENCES = 16
_TOWERS: dict[str, HSTUConfig | TransformerConfig] = {
    "HSTU-large": HSTUConfig(width=50, num_layers=8, num_heads=2, max_length=200),
    "HSTU, production layer": HSTUConfig(
        width=64, num_layers=4, num_heads=4, max_length=200, affine_norm=True, uvqk_bias=True, concat_ux=True
    ),
    "SASRec": TransformerConfig(width=50, num_layers=2, max_length=200),
}

# a small parent: the largest size that the system reports for a child begins at its parent's
_TIMER = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(code, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def run(options: argparse.Namespace) -> int:
    """Writes `plan.json`."""
    rows: list[Row] = []
    ratios: list[Ratio] = []
    for ranks, seconds in _SECONDS.items():
        found = _command(ranks, 1 if options.quick else _RUNS)
        rows += found
        ratios += _limits(found, seconds)
    for case, predicted, measured, target in _predictions(options.quick):
        log.info("%s: predicted %.2f MB, measured %.2f MB", case, predicted / _MEGABYTE, measured / _MEGABYTE)
        rows += [_megabytes(case, "predicted", predicted), _megabytes(case, "measured", measured)]
        ratios.append(
            Ratio(
                case=case,
                metric="agreement of bytes",
                a="smaller",
                b="larger of predicted and measured",
                value=min(predicted, measured) / max(predicted, measured),
                target=target,
            )
        )
    written = Results(
        name="plan", command=options.command, rows=tuple(rows), ratios=tuple(ratios), **vars(describe(options.device))
    )
    path = write(written, options.output)
    sys.stdout.write(f"{ratios_table(written)}\n{path}\n")
    return 0 if all(ratio.met is not False for ratio in ratios) else 1


def _command(ranks: int, runs: int) -> list[Row]:
    """Seconds and peak memory of the whole command, start of Python included."""
    case, seconds, peaks = f"hstu_1p5t, {ranks} ranks", [], []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            job = ["experiment=hstu_1p5t", "cluster=h100x256", f"cluster.ranks={ranks}", f"--folder={folder}"]
            command = [sys.executable, "-c", _TIMER, sys.executable, "-m", "hstu_dist", "plan", *job]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        code, took, kilobytes = done.stdout.split()
        if code != "0":
            raise UserError(f"{case}: the command ended with code {code}: {done.stderr.strip()}", "run it by hand")
        seconds.append(float(took))
        peaks.append(int(kilobytes) * 1024 / _MEGABYTE)
        log.info("%s: %.2f s, %.0f MB", case, seconds[-1], peaks[-1])
    return [
        Samples(tuple(seconds)).row(case, _CONTENDER, "time", "s"),
        Samples(tuple(peaks)).row(case, _CONTENDER, "peak memory", "MB"),
    ]


def _limits(rows: list[Row], seconds: float) -> Iterator[Ratio]:
    for row, limit in zip(rows, (seconds, _PEAK_MB), strict=True):
        yield Ratio(
            case=row.case,
            metric=row.metric,
            a=f"limit {limit:g} {row.unit}",
            b=_CONTENDER,
            value=limit / row.value,
            target=1.0,
        )


def _predictions(quick: bool) -> Iterator[tuple[str, float, float, float]]:
    """(case, predicted bytes, measured bytes, target)."""
    for ranks in _RANKS[:1] if quick else _RANKS:
        for kind in _KINDS:
            memory = memory_of(job_of(kind, _ITEMS, ranks), ranks)
            measured = max(rank.process for rank in run_ranks(ranks, held, kind, _ITEMS))
            yield f"resident, {kind}, {ranks} ranks", memory.resident + memory.gradients, measured, _RESIDENT
    for name, model in _TOWERS.items():
        predicted = activation_bytes(model, _SEQUENCES * model.max_length)
        yield f"activations, {name}", predicted, saved_bytes(model, _SEQUENCES), _ACTIVATIONS


def _megabytes(case: str, contender: str, size: float) -> Row:
    return Samples((size / _MEGABYTE,)).row(case, contender, "memory", "MB")
