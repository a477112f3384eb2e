"""Attention: the package's backends against torch's flash attention and the padded research code.

Every case is timed forward and forward+backward, autograd and allocation included, fp32 on a CPU and bf16 on a
GPU. Each contender is checked against float64 first. The figures are: time; rate, from needed work only
(`Case.flops`); that rate over the rate of a plain matrix product timed in turn with it; and peak extra memory of
one forward+backward. The same backend is timed twice under two names: how far that ratio is from 1 is the noise.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.attention_cases import Case, cases, one_sequence
from benchmarks.attention_contenders import build, computes_softmax, training_step
from benchmarks.attention_problem import Expected, Problem, expected, make_problem
from benchmarks.harness import (
    GEMM,
    Contender,
    Effort,
    Gemm,
    Samples,
    Timings,
    clock_of,
    compare,
    gemm,
    refuse_wrong,
)
from benchmarks.memory import peak_extra_mb
from benchmarks.options import positive
from hstu_dist.ops import backends
from hstu_dist.ops.spec import Backend
from hstu_dist.report.plots import save_bars
from hstu_dist.report.results import Ratio, Results, Row, write
from hstu_dist.report.tables import ratios_table, rows_table

log = logging.getLogger(__name__)

FORWARD, TRAINING = "forward", "forward+backward"
MEMORY = "peak extra memory"
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 3e-2}
"""Largest relative error; float32 sums of 8192 terms stay well below, a wrong mask or scale is far above."""

GROWTH_TARGET = 0.9
"""Memory of the shortest, scaled by length, over memory of the longest: 1 is linear, 1/8 would be quadratic."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How this run measures.

    Attributes:
        device: where.
        dtype: of q, k and v.
        effort: how long.
        gemm_size: edge of the yardstick's matrices.
        rivals: backends of `hstu_attention` that are timed, fastest first.
        growth: lengths of one sequence whose memory is compared.
        weigh_all: measure the memory of every contender, not of the fastest backend alone.
    """

    device: torch.device
    dtype: torch.dtype
    effort: Effort
    gemm_size: int
    rivals: tuple[str, ...]
    growth: tuple[int, ...]
    weigh_all: bool

    @property
    def ours(self) -> str:
        """The backend that the targets are about."""
        return self.rivals[0]


@dataclass
class Findings:
    """What the cases gave so far."""

    rows: list[Row] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    keys = [case.key for case in cases()]
    parser.add_argument("--only", choices=keys, help="time one case; does not touch the committed results")
    parser.add_argument("--rounds", type=positive, default=5, help="rounds at least (default: %(default)s)")
    parser.add_argument("--tune", action="store_true", help="write the table of Triton tile sizes for this GPU")


def run(options: argparse.Namespace) -> int:
    """Measures all cases and writes `attention_<device>`.

    Returns:
        0, or 1 if a contender computed something wrong.
    """
    if options.tune:
        # imported here: a rare errand that timing does without
        from benchmarks import tune

        return tune.run(options)
    settings = settings_for(options.device, rounds=options.rounds, quick=options.quick)
    findings = Findings()
    for case in _chosen(options):
        log.info("case %s", case.name)
        measure(case, settings, findings)
    if options.only is None:
        _measure_growth(settings, findings)
    _report(findings, settings, options)
    return 1 if findings.refused else 0


def settings_for(device: torch.device, *, rounds: int = 5, quick: bool = False) -> Settings:
    """How to measure on a device, in that many rounds or more."""
    effort = Effort(min_rounds=rounds)
    on_gpu = device.type == "cuda"
    # a matrix product of 2048 cubed would not fill a GPU
    size = 8192 if on_gpu else 2048
    return Settings(
        device=device,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        effort=Effort(budget_seconds=0.3, min_rounds=3, warm_up_seconds=0.0) if quick else effort,
        gemm_size=256 if quick else size,
        rivals=tuple(str(b) for b in backends.available(device) if b is not Backend.REFERENCE),
        growth=(1024, 2048) if quick else (8192, 16384, 32768, 65536),
        weigh_all=not quick,
    )


def _chosen(options: argparse.Namespace) -> Iterator[Case]:
    for case in cases():
        if options.only in (None, case.key):
            yield case.tiny() if options.quick else case


def measure(case: Case, settings: Settings, findings: Findings) -> None:
    """Checks, times and weighs all contenders of a case."""
    checked = refuse_wrong(_contenders(case, settings), TOLERANCE[settings.dtype])
    findings.refused += [f"{case.name}: {reason}" for reason in checked.refused]
    yardstick = gemm(settings.device, settings.dtype, settings.gemm_size)
    clock = clock_of(settings.device)
    for metric in (FORWARD, TRAINING):
        log.info("%s", metric)
        steps = {contender.name: contender.steps[metric] for contender in checked.sound}
        if settings.ours in steps:
            steps[_again(settings.ours)] = steps[settings.ours]
        steps[GEMM] = yardstick.step
        timings = compare(steps, settings.effort, clock)
        findings.rows += _rows(case, metric, timings, yardstick)
        if settings.ours in steps:
            findings.ratios += _ratios(case, metric, timings, settings.ours, yardstick)
    for contender in checked.sound:
        if settings.weigh_all or contender.name == settings.ours:
            _measure_memory(case, contender.name, settings, findings)


def _again(name: str) -> str:
    return f"{name} again"


def _contenders(case: Case, settings: Settings) -> list[Contender]:
    problem = make_problem(case, settings.device, settings.dtype)
    exact = _exact(problem, settings)
    contenders = []
    for name in (*settings.rivals, *case.baselines):
        implementation = build(name, problem)
        contenders.append(
            Contender(
                name=name,
                steps={FORWARD: implementation.forward, TRAINING: implementation.training},
                error=partial(implementation.error, exact[computes_softmax(name)]),
            )
        )
    return contenders


def _exact(problem: Problem, settings: Settings) -> Mapping[bool, Expected]:
    """Exact values by whether a contender computes softmax; only those that the case needs."""
    exact = {False: expected(problem, problem.hstu_spec(Backend.BLOCKED), bias=problem.case.bias)}
    if any(computes_softmax(name) for name in problem.case.baselines):
        exact[True] = expected(problem, problem.softmax_spec(), bias=False)
    return exact


def _rows(case: Case, metric: str, timings: Timings, yardstick: Gemm) -> Iterator[Row]:
    for name, seconds in timings.seconds.items():
        flops = yardstick.flops if name == GEMM else case.flops(backward=metric == TRAINING)
        yield seconds.map(lambda s: s * 1e3).row(case.name, name, metric, "ms")
        rate = Samples(tuple(flops / s / 1e9 for s in seconds.values))
        yield rate.row(case.name, name, f"{metric} rate", "GFLOP/s")
        if name != GEMM:
            share = _gemm_share(name, flops, timings, yardstick)
            yield share.row(case.name, name, f"{metric} gemm share", "1")


def _gemm_share(name: str, flops: float, timings: Timings, yardstick: Gemm) -> Samples:
    return timings.speed_ratio(name, GEMM).map(lambda faster: faster * flops / yardstick.flops)


def _ratios(case: Case, metric: str, timings: Timings, ours: str, yardstick: Gemm) -> Iterator[Ratio]:
    rate = f"{metric} rate"
    others = [name for name in timings.seconds if name not in (ours, _again(ours), GEMM)]
    sdpa = [name for name in others if computes_softmax(name)]
    # of its variants only the best is the one to beat
    best = [timings.fastest(sdpa)] if sdpa else []
    for name in [name for name in others if name not in sdpa] + best:
        target = case.speed_targets.get("sdpa" if name in sdpa else name)
        value = timings.speed_ratio(ours, name).median
        yield Ratio(case=case.name, metric=rate, a=ours, b=name, value=value, target=target)
    share = _gemm_share(ours, case.flops(backward=metric == TRAINING), timings, yardstick).median
    yield Ratio(case=case.name, metric=rate, a=ours, b=GEMM, value=share, target=case.gemm_target)
    noise = timings.speed_ratio(ours, _again(ours)).median
    yield Ratio(case=case.name, metric=rate, a=ours, b=_again(ours), value=noise)


def _measure_memory(case: Case, name: str, settings: Settings, findings: Findings) -> float | None:
    step, rehearsal = (
        partial(training_step, name, shape, settings.device, settings.dtype) for shape in (case, case.tiny())
    )
    peak = peak_extra_mb(step, rehearsal, settings.device)
    if peak is None:
        return None
    findings.rows.append(Samples((peak,)).row(case.name, name, MEMORY, "MB"))
    if name == settings.ours and case.memory_limit_mb is not None:
        limit = case.memory_limit_mb
        findings.ratios.append(
            Ratio(case=case.name, metric=MEMORY, a=f"limit {limit:g} MB", b=name, value=limit / peak, target=1.0)
        )
    return peak


def _measure_growth(settings: Settings, findings: Findings) -> None:
    """Peak memory of one ever longer sequence: linear in its length, or not."""
    lengths = settings.growth
    peaks = {n: _measure_memory(one_sequence(n), settings.ours, settings, findings) for n in lengths}
    first, last = peaks[lengths[0]], peaks[lengths[-1]]
    if first is None or last is None:
        return
    growth = lengths[-1] // lengths[0]
    findings.ratios.append(
        Ratio(
            case=one_sequence(lengths[-1]).name,
            metric=MEMORY,
            a=f"{growth} x {settings.ours} at N{lengths[0]}",
            b=settings.ours,
            value=growth * first / last,
            target=GROWTH_TARGET,
        )
    )


def _report(findings: Findings, settings: Settings, options: argparse.Namespace) -> None:
    found = Results(
        name=f"attention_{environment.device_slug(settings.device)}",
        command=options.command,
        **asdict(environment.describe(settings.device)),
        rows=tuple(findings.rows),
        ratios=tuple(findings.ratios),
    )
    folder: Path = options.output
    path = write(found, folder)
    save_bars(found, f"{TRAINING} rate", folder / f"{found.name}_rate")
    sys.stdout.write(f"{rows_table(found)}\n{ratios_table(found)}\n{path}\n")
    for reason in findings.refused:
        sys.stdout.write(f"refused, no row: {reason}\n")
