"""The slowest rank is logged, and one that stays slow is named."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hstu_dist.batch import JaggedBatch
from hstu_dist.commands.memory import explained_memory
from hstu_dist.distributed.process_group import process_group
from hstu_dist.errors import UserError
from hstu_dist.models.flops import Workload
from hstu_dist.train import hooks, ranks
from hstu_dist.train.config import LoggingConfig
from hstu_dist.train.hooks import LogHook
from hstu_dist.train.metrics_file import read_metrics
from hstu_dist.train.metrics_log import MetricsLog
from hstu_dist.train.ranks import Pace, StragglerHook
from hstu_dist.train.step import StepResult
from tests.distributed.ranks import run_ranks
from tests.train.cases import BATCHES, WORLD, idle_trainer


@pytest.mark.parametrize(
    ("seconds", "rank", "ratio"),
    [([1.0], 0, 1.0), ([1.0, 3.0], 1, 3.0), ([2.0, 1.0, 1.0, 5.0], 3, 5.0), ([0.0, 0.0], 0, 1.0)],
)
def test_the_slowest_against_the_median(seconds: list[float], rank: int, ratio: float) -> None:
    pace = Pace.of(seconds)
    assert (pace.slowest_rank, pace.ratio) == (rank, ratio)


def watched(folder: Path, slow_ratio: float | None) -> list[str]:
    """On a rank: warnings of a run in which rank 1 is always slow, rank 2 once."""
    with process_group("cpu", 60) as world:
        log = MetricsLog(folder, LoggingConfig(tensorboard=False), {}, 0) if world.is_main else None
        hook = StragglerHook(2, slow_ratio, log)
        warnings: list[str] = []
        hook_logger = logging.getLogger("hstu_dist.train.ranks")
        hook_logger.addFilter(lambda record: warnings.append(record.getMessage()) or False)
        trainer = replace(idle_trainer(epochs=4), world=world)
        clock = iter(range(0, 1000, 4))
        ranks.time = SimpleNamespace(monotonic=lambda: next(clock))  # type: ignore[assignment]
        for step in range(1, 13):
            trainer.state.step = step
            seconds = {0: 1.0, 1: 1.9, 2: 5.0 if step == 4 else 1.0}[world.rank]
            hook.after_step(trainer, StepResult(1.0, Workload(tokens=1), 0.1, seconds))
        if log is not None:
            log.close()
        return warnings


@pytest.mark.distributed
def test_a_rank_that_stays_slow_is_named_once(tmp_path: Path) -> None:
    first, *others = run_ranks(3, watched, tmp_path, 1.5)
    assert others == [[], []]
    (warning,) = first
    assert warning.startswith("step 12: rank 1 is slow: its forward takes 1.9 s, 1.9 times the median rank's")
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["ranks/slowest"]) for line in lines] == [
        (s, 2.0 if s == 4 else 1.0) for s in range(2, 13, 2)
    ]
    assert lines[1]["ranks/slowest_over_median"] == pytest.approx(3.0 / 1.9)
    assert run_ranks(3, watched, tmp_path, None) == [[], [], []]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "rank 0 ran out of host memory$"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
            "host",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
            r"rank 0 ran out of host memory \(tried to allocate 2.00 gib\)",
        ),
    ],
)
def test_memory_that_ran_out_says_what_to_change(error: Exception, said: str) -> None:
    with pytest.raises(UserError) as caught, explained_memory(WORLD):
        raise error
    assert re.search(said, caught.value.problem)
    assert "trainer.global_batch_size" in caught.value.remedy


def test_a_real_allocation_that_is_too_large() -> None:
    with pytest.raises(UserError, match="rank 0 ran out of host memory"), explained_memory(WORLD):
        torch.empty(1 << 55, dtype=torch.uint8)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), explained_memory(WORLD):
        raise RuntimeError("shape mismatch")


def logged(folder: Path) -> None:
    """On a rank: a run whose losses and memory are larger on rank 1."""
    with process_group("cpu", 60) as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "peak_memory_bytes", lambda device: (world.rank + 1) * 2**30)
        config = LoggingConfig(every_steps=1, progress=False, tensorboard=False)
        log = MetricsLog(folder, config, {}, 0) if world.is_main else None

        def step(batch: JaggedBatch, work: Workload, position: tuple[int, int]) -> StepResult:
            return StepResult((world.rank + 1.0) * work.targets, work, 0.5)

        replace(idle_trainer([LogHook(config, log, lambda work: work.tokens)], epochs=1, step=step), world=world).fit()
        if log is not None:
            log.close()


@pytest.mark.distributed
def test_a_line_of_the_log_is_of_all_ranks(tmp_path: Path) -> None:
    run_ranks(2, logged, tmp_path)
    lines = read_metrics(tmp_path)
    assert [(line["train/loss"], line["memory/peak_gib_per_rank"]) for line in lines] == [(3.0, 2.0)] * BATCHES
