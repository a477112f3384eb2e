"""Timing is interleaved, primed and paired; wrong contenders get no row."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from benchmarks.harness import (
    Contender,
    Effort,
    Samples,
    Step,
    Timings,
    clock_of,
    compare,
    gemm,
    is_out_of_memory,
    refuse_wrong,
    relative_error,
    turns,
)

CPU = torch.device("cpu")


class FakeMachine:
    """Steps of known cost on a clock of its own; notes every run and whether it was timed."""

    def __init__(self, costs: dict[str, float]) -> None:
        self.runs: list[tuple[str, bool]] = []
        self.costs = costs
        self.last = ""

    def steps(self) -> dict[str, Step]:
        return {name: (lambda name=name: self._run(name)) for name in self.costs}

    def _run(self, name: str) -> None:
        self.last = name
        self.runs.append((name, False))

    def clock(self, step: Step) -> float:
        step()
        self.runs[-1] = (self.last, True)
        return self.costs[self.last]


def test_turns_rotate_and_give_every_name_one_turn_a_round() -> None:
    assert list(turns(("a", "b", "c"), 4)) == [*"abc", *"bca", *"cab", *"abc"]
    assert list(turns((), 3)) == []


def test_compare_interleaves_after_warming_up_every_contender() -> None:
    machine = FakeMachine({"a": 2.0, "b": 3.0})
    effort = Effort(budget_seconds=1.0, min_rounds=3, warm_up_seconds=0.0)
    timings = compare(machine.steps(), effort, machine.clock)
    assert [name for name, _ in machine.runs] == [*"ab", *"ab", *"ba", *"ab"]
    assert timings.seconds == {"a": Samples((2.0,) * 3), "b": Samples((3.0,) * 3)}


def test_short_steps_run_untimed_before_each_timed_run() -> None:
    machine = FakeMachine({"long": 2.0, "short": 0.1})
    effort = Effort(budget_seconds=1.0, min_rounds=1, warm_up_seconds=0.0, primed_below_seconds=0.25)
    compare(machine.steps(), effort, machine.clock)
    assert machine.runs[2:] == [("long", True), ("short", False), ("short", True)]


def test_short_steps_are_warmed_up_for_as_long_as_asked() -> None:
    machine = FakeMachine({"short": 0.1})
    compare(machine.steps(), Effort(budget_seconds=0.0, min_rounds=0, warm_up_seconds=0.45), machine.clock)
    assert machine.runs == [("short", True)] * 5


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_left_out_and_named() -> None:
    machine = FakeMachine({"small": 1.0, "large": 1.0})

    def clock(step: Step) -> float:
        seconds = machine.clock(step)
        if machine.last == "large":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        return seconds

    timings = compare(machine.steps(), Effort(budget_seconds=0, min_rounds=2, warm_up_seconds=0), clock)
    assert timings == Timings({"small": Samples((1.0, 1.0))}, out_of_memory=("large",))


def test_other_errors_of_a_step_are_not_taken_for_memory() -> None:
    def failing(_: Step) -> float:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        compare({"x": lambda: None}, Effort(), failing)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(KeyError("memory"))


@pytest.mark.parametrize(("round_seconds", "rounds"), [(100.0, 5), (2.0, 10), (0.001, 50), (0.0, 50)])
def test_rounds_fit_the_budget_within_bounds(round_seconds: float, rounds: int) -> None:
    assert Effort(budget_seconds=20.0, min_rounds=5, max_rounds=50).rounds(round_seconds) == rounds


def test_median_and_quartiles() -> None:
    samples = Samples((5.0, 1.0, 4.0, 2.0, 3.0))
    assert (samples.median, samples.quartiles) == (3.0, (2.0, 4.0))
    assert Samples((7.0,)).quartiles == (7.0, 7.0)
    row = samples.map(lambda s: 10 * s).row("c", "x", "forward", "ms")
    assert (row.value, row.n, row.q25, row.q75) == (30.0, 5, 20.0, 40.0)


def test_speed_ratio_says_how_many_times_faster_the_first_is() -> None:
    timings = Timings({"quick": Samples((1.0, 2.0, 1.0)), "slow": Samples((3.0, 6.0, 5.0))})
    assert timings.speed_ratio("quick", "slow").values == (3.0, 3.0, 5.0)
    assert timings.speed_ratio("quick", "slow").median == 3.0
    assert timings.fastest(["slow", "quick"]) == "quick"


def test_drift_of_the_machine_cancels_within_a_round() -> None:
    slowdown = (1.0, 1.0, 9.0, 9.0, 9.0)
    timings = Timings({"a": Samples(slowdown), "b": Samples(tuple(2 * s for s in slowdown))})
    assert timings.speed_ratio("a", "b").quartiles == (2.0, 2.0)


def test_wrong_failing_and_nan_contenders_are_refused_with_their_reason() -> None:
    def out_of_memory() -> float:
        raise RuntimeError("out of\nmemory")

    errors = {"right": lambda: 1e-7, "wrong": lambda: 0.5, "nan": lambda: math.nan, "failing": out_of_memory}
    checked = refuse_wrong([Contender(name=n, steps={}, error=e) for n, e in errors.items()], 1e-5)
    assert [contender.name for contender in checked.sound] == ["right"]
    assert [reason.split(":")[0] for reason in checked.refused] == ["wrong", "nan", "failing"]
    assert checked.refused[2] == "failing: out of memory"


def test_relative_error() -> None:
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, -3.0]), exact) == 0.25
    assert math.isnan(relative_error(torch.tensor([math.nan, -4.0]), exact))
    assert relative_error(torch.tensor([math.inf, -4.0]), exact) == math.inf
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0.0
    with pytest.raises(ValueError, match="shape"):
        relative_error(torch.zeros(1), exact)


def test_wall_clock_and_yardstick_run_on_this_machine() -> None:
    yardstick = gemm(CPU, torch.float32, 32)
    assert yardstick.flops == 2 * 32**3
    count: Counter[str] = Counter()
    assert clock_of(CPU)(lambda: count.update(ran=1)) > 0.0
    assert count["ran"] == 1
