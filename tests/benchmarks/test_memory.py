"""Peak memory is what a step adds, whatever the measuring process or the parent held before."""

from __future__ import annotations

import os
import resource
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Step, is_out_of_memory
from benchmarks.memory import memory_limited, peak_extra_mb

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")


def filling(megabytes: int) -> Step:
    """A step that fills memory and frees it; its input, just as large, must not count."""
    source = torch.ones(megabytes * 250_000)
    return lambda: source.clone().sum()


def dying() -> Step:
    return lambda: os._exit(1)


@pytest.mark.slow
def test_peak_is_what_the_step_added() -> None:
    # larger than the step: a child that inherited its parent's high-water mark would report 0
    held = torch.ones(300 * 250_000)
    peak = peak_extra_mb(partial(filling, 100), partial(filling, 200), CPU)
    assert peak is not None
    assert 98 < peak < 110
    assert held.numel()


@pytest.mark.slow
def test_a_killed_process_gives_no_figure() -> None:
    assert peak_extra_mb(dying, partial(filling, 1), CPU) is None


def test_an_allocation_fails_before_the_system_runs_out() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory_limited(CPU):
        # more than this machine has, which Linux would hand out until it is touched
        with pytest.raises(RuntimeError) as failure:
            torch.empty(2**44, dtype=torch.uint8)
        assert is_out_of_memory(failure.value)
        assert torch.ones(1000).sum() == 1000
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
