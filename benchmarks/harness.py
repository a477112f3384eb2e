"""Fair timing: contenders are checked first, then take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import gc
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from hstu_dist.report.results import Row

log = logging.getLogger(__name__)

Step = Callable[[], object]
"""What is timed: one call of a contender, everything it returns dropped at once."""

Clock = Callable[[Step], float]
"""Seconds one step took."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure: as many rounds as fit the budget, within bounds.

    Attributes:
        budget_seconds: aimed-at length of one comparison, all contenders together.
        min_rounds: rounds even if they exceed the budget.
        max_rounds: rounds even if the budget allows more.
        warm_up_seconds: each contender first runs this long, at least once.
        primed_below_seconds: a step shorter than this runs once untimed before each timed run.
    """

    budget_seconds: float = 20.0
    min_rounds: int = 5
    max_rounds: int = 50
    warm_up_seconds: float = 0.3
    primed_below_seconds: float = 0.25

    def rounds(self, round_seconds: float) -> int:
        """Rounds to run when one takes `round_seconds`."""
        affordable = int(self.budget_seconds / round_seconds) if round_seconds > 0 else self.max_rounds
        return min(max(affordable, self.min_rounds), self.max_rounds)


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile; of a single value, that value."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third

    def map(self, change: Callable[[float], float]) -> Samples:
        """The samples in another unit, one by one."""
        return Samples(tuple(change(value) for value in self.values))

    def row(self, case: str, contender: str, metric: str, unit: str) -> Row:
        """These samples as a row of a result file."""
        q25, q75 = self.quartiles
        return Row(
            case=case,
            contender=contender,
            metric=metric,
            value=self.median,
            unit=unit,
            n=len(self.values),
            q25=q25,
            q75=q75,
        )


@dataclass(frozen=True)
class Timings:
    """Seconds of every contender in every round of one comparison.

    Attributes:
        seconds: by contender.
        out_of_memory: contenders whose step did not fit; they have no seconds.
    """

    seconds: Mapping[str, Samples]
    out_of_memory: tuple[str, ...] = ()

    def speed_ratio(self, a: str, b: str) -> Samples:
        """How many times faster a is than b, round by round: drift of the machine cancels within a round."""
        pairs = zip(self.seconds[a].values, self.seconds[b].values, strict=True)
        return Samples(tuple(seconds_b / seconds_a for seconds_a, seconds_b in pairs))

    def fastest(self, names: Sequence[str]) -> str:
        """The name with the smallest median."""
        return min(names, key=lambda name: self.seconds[name].median)


def compare(steps: Mapping[str, Step], effort: Effort, clock: Clock) -> Timings:
    """Times contenders in turns after warming all of them up.

    Turns alone are not fair to short steps: rotation leaves each contender with the same predecessor, and the
    caches that one leaves behind can double a time. Hence short steps are primed by a run of their own.

    Args:
        steps: what to time, by name.
        effort: how long to measure.
        clock: how to time one step; see `clock_of`.

    Returns:
        One sample per contender and round. A contender that runs out of memory is left out and named; the others
        go on.
    """
    warm: dict[str, float] = {}
    too_large: list[str] = []
    for name, step in steps.items():
        try:
            warm[name] = _warm_up(step, effort, clock)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning("%s: out of memory", name)
            too_large.append(name)
        if too_large and torch.cuda.is_available():
            torch.cuda.empty_cache()
    steps = {name: steps[name] for name in warm}
    primed = {name for name, seconds in warm.items() if seconds < effort.primed_below_seconds}
    round_seconds = sum(seconds * (2 if name in primed else 1) for name, seconds in warm.items())
    rounds = effort.rounds(round_seconds)
    log.info("%d rounds of about %.1f s", rounds, round_seconds)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    # a collection in the middle of one contender's step would be charged to it
    gc.disable()
    try:
        for name in turns(tuple(steps), rounds):
            if name in primed:
                steps[name]()
            seconds[name].append(clock(steps[name]))
    finally:
        gc.enable()
    return Timings({name: Samples(tuple(values)) for name, values in seconds.items()}, tuple(too_large))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU, in torch on a CPU or in Python."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch's CPU allocator has no exception of its own
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("not enough memory", "can't allocate memory", "bad_alloc")
    )


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Whose turn it is: every name once a round, and each round starts one name later."""
    for number in range(rounds):
        start = number % max(len(names), 1)
        yield from (*names[start:], *names[:start])


def _warm_up(step: Step, effort: Effort, clock: Clock) -> float:
    """Runs a step until it is warm; returns the seconds of its last run."""
    last = spent = clock(step)
    while spent < effort.warm_up_seconds:
        last = clock(step)
        spent += last
    return last


def clock_of(device: torch.device) -> Clock:
    """Wall time on a CPU; on a GPU the time between two events around the step's launches."""
    return _cuda_seconds if device.type == "cuda" else _wall_seconds


def _wall_seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _cuda_seconds(step: Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One implementation in a comparison.

    Attributes:
        name: as it appears in the result file.
        steps: what to time, by metric.
        error: largest relative error of what the contender computes, over all its outputs.
    """

    name: str
    steps: Mapping[str, Step]
    error: Callable[[], float]


@dataclass(frozen=True)
class Checked:
    """Contenders that compute the right thing, and the names and reasons of those refused."""

    sound: tuple[Contender, ...]
    refused: tuple[str, ...]


def refuse_wrong(contenders: Sequence[Contender], tolerance: float) -> Checked:
    """Runs every contender once and keeps those within `tolerance`; the others get no row."""
    sound, refused = [], []
    for contender in contenders:
        try:
            error = contender.error()
            reason = f"relative error {error:.1e}, allowed {tolerance:.1e}"
        except RuntimeError as failure:
            # an unsupported device, dtype or too little memory must not end the others' measurement
            error, reason = math.nan, " ".join(str(failure).split())
        # a NaN fails every comparison, hence the form
        if error <= tolerance:
            sound.append(contender)
            log.info("%s: relative error %.1e", contender.name, error)
        else:
            refused.append(f"{contender.name}: {reason}")
            log.error("%s: refused, %s", contender.name, reason)
    return Checked(tuple(sound), tuple(refused))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude; NaN and infinity count as wrong.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"actual: got shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if not actual.numel():
        return 0.0
    difference = (actual.double() - expected.double()).abs().max()
    scale = expected.double().abs().max()
    return float(difference / scale) if float(scale) else float(difference)


GEMM = "gemm"
"""Name of the matrix product that gives every rate its yardstick."""


@dataclass(frozen=True)
class Gemm:
    """A square matrix product, timed among the contenders: what the machine could do in that minute."""

    size: int
    step: Step

    @property
    def flops(self) -> float:
        """Floating-point operations of one product."""
        return 2.0 * self.size**3


def gemm(device: torch.device, dtype: torch.dtype, size: int) -> Gemm:
    """The yardstick on a device, of [size, size] matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return Gemm(size, lambda: a @ b)
