"""A whole training step on MovieLens-1M: seconds, tokens/s, FLOP/s, share of the GEMM rate, and where the time goes."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import describe, result_name
from benchmarks.harness import Samples
from benchmarks.ranks import ask_ranks
from benchmarks.train_step_worker import PARTS, Answer, Request
from hstu_dist.machine import cores_per_rank
from hstu_dist.report.results import Ratio, Results, Row, write

log = logging.getLogger(__name__)

_CONTENDER = "hstu_dist"
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration of the step.

    Attributes:
        name: what is trained.
        overrides: of the run.
        seconds: target of the median step with one rank; None: only reported.
        ranks: in how many ways the machine's cores are divided, by number of ranks.
    """

    name: str
    overrides: tuple[str, ...]
    seconds: float | None = None
    ranks: tuple[int, ...] = (1,)


CASES = (
    Case(name="HSTU-large", overrides=("experiment=ml1m_hstu_large",), seconds=0.35, ranks=(1, 2)),
    Case(
        name="HSTU-large, full softmax",
        overrides=("experiment=ml1m_hstu_large", "loss=full_softmax"),
        seconds=0.45,
        ranks=(1, 2),
    ),
    Case(name="HSTU", overrides=("experiment=ml1m_hstu",)),
    Case(name="SASRec", overrides=("experiment=ml1m_sasrec",)),
)
_MEMORY_GB = 1.0
"""What a rank may take at its peak."""


PARTIAL = ("override",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="these cases")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="added to every run, may be repeated"
    )


def run(options: argparse.Namespace) -> int:
    """Measures every case, prints the parts of its step and writes the result file."""
    rows: list[Row] = []
    ratios: list[Ratio] = []
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        for ranks in case.ranks:
            if options.device.type == "cuda" and ranks > torch.cuda.device_count():
                log.warning("%s on %d ranks: left out, a rank needs a GPU of its own", case.name, ranks)
                continue
            label = f"{case.name}, {ranks} x {options.threads or cores_per_rank(ranks)} threads"
            log.info("%s", label)
            answer = _measure(case, ranks, options)
            rows += rows_of(label, answer)
            ratios += ratios_of(label, case, answer)
            _print_parts(label, answer)
    results = Results(
        name=result_name("train_step", options.device),
        command=options.command,
        rows=tuple(rows),
        ratios=tuple(ratios),
        **asdict(describe(options.device)),
    )
    log.info("written to %s", write(results, options.output))
    return 0


def rows_of(label: str, answer: Answer) -> list[Row]:
    """Everything measured of one case."""
    seconds = Samples(tuple(answer.seconds))
    rates = Samples(tuple(n / s for n, s in zip(answer.tokens, answer.seconds, strict=True)))
    flops = Samples(tuple(f / s for f, s in zip(answer.flops, answer.seconds, strict=True)))
    figures = [
        seconds.row(label, _CONTENDER, "step", "s"),
        rates.row(label, _CONTENDER, "tokens", "tokens/s"),
        flops.map(lambda x: x / 1e9).row(label, _CONTENDER, "needed FLOPs", "GFLOP/s"),
        Samples(tuple(answer.gemm_flops_per_second))
        .map(lambda x: x / 1e9)
        .row(label, "gemm", "needed FLOPs", "GFLOP/s"),
        Samples((answer.peak_bytes / _GB,)).row(label, _CONTENDER, "peak memory of a rank", "GB"),
    ]
    parts = [Samples((answer.parts[p],)).row(label, _CONTENDER, f"profiled: {p}", "s") for p in PARTS]
    return figures + parts


def ratios_of(label: str, case: Case, answer: Answer) -> list[Ratio]:
    """Share of the GEMM rate, and the targets."""
    seconds, gemm = Samples(tuple(answer.seconds)).median, Samples(tuple(answer.gemm_flops_per_second)).median
    flops = Samples(tuple(f / s for f, s in zip(answer.flops, answer.seconds, strict=True))).median
    ratios = [Ratio(case=label, metric="needed FLOPs", a=_CONTENDER, b="gemm", value=flops / gemm)]
    if case.seconds is not None:
        peak = answer.peak_bytes / _GB
        ratios += [
            Ratio(case=label, metric="step", a=f"{case.seconds} s", b="step", value=case.seconds / seconds, target=1.0),
            Ratio(
                case=label, metric="peak memory", a=f"{_MEMORY_GB} GB", b="rank", value=_MEMORY_GB / peak, target=1.0
            ),
        ]
    return ratios


def overrides_of(case: Case, ranks: int, options: argparse.Namespace) -> list[str]:
    """Overrides of a case's run, those of the command line last."""
    given = [f"trainer.device={options.device.type}"]
    if options.threads is not None:
        given.append(f"trainer.threads={options.threads}")
    return [*case.overrides, f"nproc={ranks}", *given, *options.override]


def _measure(case: Case, ranks: int, options: argparse.Namespace) -> Answer:
    request = Request(overrides=overrides_of(case, ranks, options), steps=2 if options.quick else 25)
    remedy = "its messages are above; `make data` prepares MovieLens-1M"
    return Answer(**ask_ranks("benchmarks.train_step_worker", ranks, request, remedy))


def _print_parts(label: str, answer: Answer) -> None:
    median = Samples(tuple(answer.seconds)).median
    table = Table(
        title=f"{label}: {median * 1e3:.0f} ms a step, {sum(answer.tokens) / sum(answer.seconds):,.0f} tokens/s"
    )
    table.add_column("part")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    total = sum(answer.parts.values())
    for part in PARTS:
        table.add_row(part, f"{answer.parts[part] * 1e3:.1f}", f"{answer.parts[part] / total:.0%}")
    table.add_row("profiled step", f"{total * 1e3:.1f}", "")
    Console(width=100).print(table)
