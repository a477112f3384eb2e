"""Scoring and serving: M-FALCON against one candidate at a time, cached histories, memory, and a server under load."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks import environment
from benchmarks.cells import Findings
from benchmarks.harness import GEMM, Effort, Samples, Step, Timings, clock_of, compare, gemm
from benchmarks.inference_load import serving
from benchmarks.memory import peak_extra_mb
from benchmarks.parts import run_parts
from hstu_dist.inference.batches import Candidates, History, MicroBatch
from hstu_dist.inference.cache import StateCache
from hstu_dist.inference.mfalcon import Encoder, Scorer
from hstu_dist.models.config import HSTUConfig
from hstu_dist.models.flops import Workload, count_flops
from hstu_dist.models.tower import Tower
from hstu_dist.report.results import Ratio, Row

ALONE, COLD, CACHED = "one by one", "M-FALCON, cold", "M-FALCON, cached history"
_ITEMS = 10_000
_SPEED_UP, _OF_BOUND, _REPEAT, _LINEAR = 50.0, 0.9, 5.0, 0.9


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One user, and candidates after one history.

    Attributes:
        history: events.
        candidates: of the request.
        micro_batch: candidates that pass at once.
    """

    history: int
    candidates: int
    micro_batch: int = 1024

    @property
    def model(self) -> HSTUConfig:
        """Of the paper's layer, 4 of them."""
        return HSTUConfig(width=256, num_heads=4, num_layers=4, max_length=self.history + 1, dropout=0.0)

    def label(self) -> str:
        """The case of its rows."""
        return f"history {self.history:,}, {self.candidates:,} candidates, D 256, 4 layers, fp32"


def run(options: argparse.Namespace) -> int:
    """Measures everything and writes the result file."""
    quick = options.quick
    size = Problem(history=256, candidates=64) if quick else Problem(history=4096, candidates=1024)
    parts: dict[str, Callable[[], Findings]] = {}
    for share in (1, 2, 8):
        problem = replace(size, candidates=size.candidates // share)
        parts[f"speed_{problem.candidates}"] = partial(speed, problem, options.device, quick)
    parts["memory"] = partial(memory, size, options.device)
    if options.device.type == "cpu":
        # its server computes there
        parts["serving"] = partial(serving, quick)
    return run_parts(environment.result_name("inference", options.device), parts, options, options.device)


def encoder_of(problem: Problem, device: torch.device) -> Encoder:
    """A tower and a table with random weights."""
    torch.manual_seed(0)
    tower = Tower(problem.model, device).requires_grad_(False)
    table = torch.randn(_ITEMS, problem.model.width, device=device)
    return Encoder(
        embed=lambda tokens: table[tokens[:, 0]],
        encode=tower,
        weights=(table, *tower.parameters()),
        max_length=problem.model.max_length,
    )


def request_of(problem: Problem, device: torch.device) -> tuple[History, Candidates]:
    """A history of events minutes to days apart, and candidates asked about a minute after the last one."""
    n = problem.history
    times = (torch.randint(60, 100_000, (n + 1,)).cumsum(0) + 10**9).to(device)
    history = History(
        offsets=torch.tensor([0, n], device=device),
        tokens=torch.randint(_ITEMS, (n, 1), device=device),
        key_times=times[:-1].contiguous(),
        query_times=times[1:].contiguous(),
        users=["user"],
    )
    candidates = Candidates(
        offsets=torch.tensor([0, problem.candidates], device=device),
        tokens=torch.randint(_ITEMS, (problem.candidates, 1), device=device),
        times=times[-1:].contiguous(),
    )
    return history, candidates


def speed(problem: Problem, device: torch.device, quick: bool) -> Findings:
    """One request, cold, repeated, and a sample of its candidates one by one."""
    scorer = Scorer(encoder_of(problem, device))
    history, candidates = request_of(problem, device)
    micro_batch, cache = MicroBatch(candidates=problem.micro_batch), StateCache(1 << 30)
    turn = itertools.count()

    def alone() -> object:
        # each appended to the history in turn: a sample, because all of them would take minutes
        place = next(turn) % problem.candidates
        one = Candidates(
            offsets=torch.tensor([0, 1], device=device),
            tokens=candidates.tokens[place : place + 1],
            times=candidates.times,
        )
        return scorer.score(history, one)

    steps: dict[str, Step] = {
        ALONE: alone,
        COLD: lambda: scorer.score(history, candidates, micro_batch),
        CACHED: lambda: scorer.score(history, candidates, micro_batch, cache),
        GEMM: gemm(device, torch.float32, 256 if quick else 2048).step,
    }
    effort = Effort(budget_seconds=1 if quick else 25, min_rounds=2 if quick else 5, max_rounds=20, warm_up_seconds=0)
    timings = compare(steps, effort, clock_of(device))
    return Findings(speed_rows(problem, timings), speed_ratios(problem, timings))


def flops(problem: Problem) -> dict[str, int]:
    """Needed FLOPs of a request by the way it is answered."""
    n, m = problem.history, problem.candidates
    old = Workload.causal([n])
    new = Workload(tokens=m, attention_pairs=m * (n + 1))

    def forward(work: Workload) -> int:
        return count_flops(problem.model, work, 0).forward

    return {ALONE: m * forward(Workload.causal([n + 1])), COLD: forward(old + new), CACHED: forward(new)}


def speed_rows(problem: Problem, timings: Timings) -> list[Row]:
    """Seconds, and candidates a second."""
    rows = []
    for name in (ALONE, COLD, CACHED):
        seconds = timings.seconds[name]
        scored = 1 if name == ALONE else problem.candidates
        done = flops(problem)[name] / (problem.candidates if name == ALONE else 1)
        what = "one candidate" if name == ALONE else "request"
        rows.append(seconds.row(problem.label(), name, what, "s"))
        rows.append(seconds.map(lambda s, n=scored: n / s).row(problem.label(), name, "candidates", "1/s"))  # type: ignore[misc]
        rows.append(seconds.map(lambda s, f=done: f / s / 1e9).row(problem.label(), name, "needed FLOPs", "GFLOP/s"))  # type: ignore[misc]
    return rows


def speed_ratios(problem: Problem, timings: Timings) -> list[Ratio]:
    """Measured against the targets, and against what arithmetic allows."""
    case, needed = problem.label(), flops(problem)
    faster = timings.speed_ratio(COLD, ALONE).median * problem.candidates
    bound = needed[ALONE] / needed[COLD]
    repeat, repeat_bound = timings.speed_ratio(CACHED, COLD).median, needed[COLD] / needed[CACHED]
    return [
        Ratio(case=case, metric="candidates/s", a=COLD, b=ALONE, value=faster, target=_SPEED_UP),
        Ratio(
            case=case,
            metric="candidates/s, measured over the arithmetic bound",
            a=f"{COLD} / {ALONE}",
            b=f"{bound:.0f}",
            value=faster / bound,
            target=_OF_BOUND,
        ),
        Ratio(case=case, metric="repeated request", a=CACHED, b=COLD, value=repeat, target=_REPEAT),
        Ratio(
            case=case,
            metric="repeated request, measured over the arithmetic bound",
            a=f"{CACHED} / {COLD}",
            b=f"{repeat_bound:.2f}",
            value=repeat / repeat_bound,
        ),
    ]


def build(problem: Problem, device: torch.device) -> Step:
    """A cold request."""
    scorer = Scorer(encoder_of(problem, device))
    history, candidates = request_of(problem, device)
    return lambda: scorer.score(history, candidates, MicroBatch(candidates=problem.micro_batch))


def memory(largest: Problem, device: torch.device) -> Findings:
    """Peak memory as history and micro-batch double, and as candidates alone do."""
    n, m = largest.history, largest.micro_batch
    half = Problem(history=n // 2, candidates=2 * m, micro_batch=m // 2)
    whole = Problem(history=n, candidates=2 * m, micro_batch=m)
    many = Problem(history=n, candidates=8 * m, micro_batch=m)
    rehearsal = partial(build, Problem(history=8, candidates=4), device)
    found = {p: peak_extra_mb(partial(build, p, device), rehearsal, device) for p in (half, whole, many)}
    case = "peak memory of a cold request, D 256, 4 layers"
    rows, ratios = [], []
    for p, mb in found.items():
        if mb is not None:
            name = f"history {p.history:,}, micro-batch {p.micro_batch:,}, {p.candidates:,} candidates"
            rows.append(Samples((mb,)).row(case, name, "memory", "MB"))
    small, large, more = (found[p] for p in (half, whole, many))
    if small and large and more:
        grown = Ratio(
            case=case, metric="2 x history and micro-batch", a="2 x memory", b="measured", value=2 * small / large,
            target=_LINEAR,
        )  # fmt: skip
        # outputs of the candidates themselves are the caller's
        kept = (many.candidates - whole.candidates) * 256 * 4 / 1e6
        same = Ratio(
            case=case, metric="4 x candidates", a="the same memory and the outputs", b="measured",
            value=(large + kept) / more, target=_LINEAR,
        )  # fmt: skip
        ratios = [grown, same]
    return Findings(rows, ratios)
