"""What the ranks tell about themselves while they train: where they are, and how fast each one computes."""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from hstu_dist.train.metrics_log import MetricsLog
from hstu_dist.train.step import StepResult
from hstu_dist.train.trainer import Hook, Trainer

_PATIENCE_SECONDS = 10.0
"""A rank that is slow for less has had an accident, such as another process on its cores."""

logger = logging.getLogger(__name__)


class HeartbeatHook(Hook):
    """Puts the number of steps taken into this rank's heartbeat, for the others to find if it falls silent."""

    def on_start(self, trainer: Trainer) -> None:
        """From where a restored run goes on."""
        self._note(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """One more."""
        self._note(trainer)

    def _note(self, trainer: Trainer) -> None:
        if trainer.world.heartbeat is not None:
            trainer.world.heartbeat.step = trainer.state.step


@dataclass(frozen=True)
class Pace:
    """Seconds of a forward on the slowest and the median rank."""

    slowest_rank: int
    slowest: float
    median: float

    @classmethod
    def of(cls, seconds: list[float]) -> Pace:
        """From the mean of every rank."""
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        return cls(slowest, seconds[slowest], statistics.median_low(seconds))

    @property
    def ratio(self) -> float:
        """Slowest over median."""
        return self.slowest / self.median if self.median else 1.0


class StragglerHook(Hook):
    """Compares the ranks' forward times every few steps, logs the slowest, and warns of one that stays slow.

    Whole steps take equally long on all ranks, because they wait for each other; the forward waits for nobody.
    """

    def __init__(self, every_steps: int, slow_ratio: float | None, log: MetricsLog | None) -> None:
        """Compares after every `every_steps`; warns if one rank stays above `slow_ratio`; None: never."""
        self.every_steps = every_steps
        self.slow_ratio = slow_ratio
        self.log = log
        self._seconds = 0.0
        self._steps = 0
        self._suspect = -1
        self._suspected_since = 0.0
        self._warned = -1

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Adds the step up; compares every few."""
        self._seconds += result.forward_seconds
        self._steps += 1
        if trainer.world.size == 1 or trainer.state.step % self.every_steps:
            return
        mine = torch.tensor([self._seconds / self._steps], dtype=torch.float64, device=trainer.world.device)
        self._seconds, self._steps = 0.0, 0
        everyone = [torch.empty_like(mine) for _ in range(trainer.world.size)]
        dist.all_gather(everyone, mine)
        pace = Pace.of([float(seconds) for seconds in everyone])
        if self.log is not None:
            values = {
                "ranks/slowest": float(pace.slowest_rank),
                "ranks/forward_seconds_slowest": pace.slowest,
                "ranks/forward_seconds_median": pace.median,
                "ranks/slowest_over_median": pace.ratio,
            }
            self.log.write(trainer.state.step, values)
        if trainer.world.is_main:
            self._judge(pace, trainer.state.step)

    def _judge(self, pace: Pace, step: int) -> None:
        slow = self.slow_ratio is not None and pace.ratio >= self.slow_ratio
        suspect, now = pace.slowest_rank if slow else -1, time.monotonic()
        if suspect != self._suspect:
            self._suspect, self._suspected_since = suspect, now
        elif slow and suspect != self._warned and now - self._suspected_since >= _PATIENCE_SECONDS:
            self._warned = suspect
            logger.warning(
                "step %d: rank %d is slow: its forward takes %.3g s, %.1f times the median rank's; look at the load, "
                "clock and memory of its machine, and at speed/imbalance in the log",
                step,
                suspect,
                pace.slowest,
                pace.ratio,
            )
