"""The training loop. Everything periodic is a hook."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from typing import Protocol

import torch

from hstu_dist.batch import JaggedBatch
from hstu_dist.data.balance import Imbalance
from hstu_dist.data.prefetch import prefetch
from hstu_dist.distributed.process_group import World, sum_over_ranks
from hstu_dist.models.flops import Workload
from hstu_dist.train.state import TrainState
from hstu_dist.train.step import StepResult

_PREFETCH_BATCHES = 4


class Loader(Protocol):
    """This rank's share of every global batch, epoch by epoch."""

    def __len__(self) -> int:
        """Global batches of an epoch; of a stream, of the latest one that was asked for."""

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[JaggedBatch]:
        """Batches `first_batch` to the last."""

    def imbalance(self, epoch: int, batch: int) -> Imbalance:
        """How evenly the work of a global batch is shared out."""


class Hook:
    """Something that happens around the loop; a hook overrides what it needs. Called on every rank."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process."""

    def before_epoch(self, trainer: Trainer) -> None:
        """Before the first step of an epoch, also of one that was begun in another process."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """After each optimizer step; `trainer.state` already counts it."""

    def after_epoch(self, trainer: Trainer) -> None:
        """After the last step of an epoch; `trainer.state` already counts it."""

    def on_stop(self, trainer: Trainer) -> None:
        """After the last step of this process, finished or asked to stop."""


@dataclass
class Trainer:
    """Runs steps until the epochs are done, a hook ends the run, or somebody asks to stop.

    Attributes:
        step: trains on one batch.
        loader: this rank's share of every global batch.
        state: where the run is; a restored state continues there.
        epochs: how many the learning-rate schedule spans; None: nobody knows how many there will be.
        world: this rank among the others.
        hooks: called in order.
        stop_epoch: end after that epoch; None: after the last of the schedule.
        workload: work of sequences by their lengths; a step's FLOPs and the mean of its loss go by it.
        peak_flops: FLOP/s that the devices of all ranks can do together; None: unknown.
        stop_requested: whether this rank was asked to stop (SIGTERM); the ranks agree before each step.
        interrupted: whether the loop ended because of such a request.
        exhausted: whether it ended because the data has no further epoch.
    """

    step: Callable[[JaggedBatch, Workload, tuple[int, int | None]], StepResult]
    loader: Loader
    state: TrainState
    epochs: int | None
    world: World
    hooks: Sequence[Hook] = ()
    stop_epoch: int | None = None
    workload: Callable[[Sequence[int]], Workload] = Workload.causal
    peak_flops: float | None = None
    stop_requested: Callable[[], bool] = lambda: False
    interrupted: bool = field(default=False, init=False)
    exhausted: bool = field(default=False, init=False)
    _since: float = field(default=0.0, init=False)

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole schedule."""
        return None if self.epochs is None else self.epochs * len(self.loader)

    @property
    def last_epoch(self) -> float:
        """Epochs after which the loop ends at the latest."""
        return self.stop_epoch or self.epochs or math.inf

    def fit(self) -> None:
        """Trains from `state` to the end."""
        for hook in self.hooks:
            hook.on_start(self)
        self._lap()
        while not self._is_over():
            for hook in self.hooks:
                hook.before_epoch(self)
            if not self._is_over():
                self._run_epoch()
        for hook in self.hooks:
            hook.on_stop(self)

    def _is_over(self) -> bool:
        asked = self.state.stopped_early or self.interrupted
        return asked or self.exhausted or self.state.epoch >= self.last_epoch

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Time spent inside, evaluating or waiting, does not count as training."""
        if self.world.device.type == "cuda":
            # the last step may still be running
            torch.cuda.synchronize(self.world.device)
        self.state.add_training_time(self._lap(), self.peak_flops)
        yield
        self.state.evaluation_seconds += self._lap()

    def _run_epoch(self) -> None:
        state = self.state
        for host_batch in prefetch(self.loader.epoch(state.epoch, state.batch), _PREFETCH_BATCHES):
            work, self.interrupted = self._agree(host_batch)
            if self.interrupted:
                return
            result = self.step(host_batch.to(self.world.device), work, (state.step, self.total_steps))
            self._count(work)
            for hook in self.hooks:
                hook.after_step(self, result)
        state.epoch, state.batch = state.epoch + 1, 0
        for hook in self.hooks:
            hook.after_epoch(self)

    def _agree(self, batch: JaggedBatch) -> tuple[Workload, bool]:
        """Work of all ranks' shares, and whether any rank was asked to stop."""
        share = self.workload(batch.lengths.tolist()) + Workload(context=batch.num_context)
        mine = [*astuple(share), int(self.stop_requested())]
        *work, stopping = sum_over_ranks(torch.tensor(mine, device=self.world.device)).tolist()
        return Workload(**dict(zip(asdict(share), work, strict=True))), stopping > 0

    def _count(self, work: Workload) -> None:
        state = self.state
        state.batch, state.step = state.batch + 1, state.step + 1
        state.tokens += work.tokens
        state.attention_pairs += work.attention_pairs
        state.context += work.context
        state.skipped_tokens += work.skipped_tokens
        state.skipped_pairs += work.skipped_pairs
        state.add_training_time(self._lap(), self.peak_flops)

    def _lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds
