"""The training loop. Everything periodic is a hook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from hstu_dist.batch import JaggedBatch
from hstu_dist.data.loader import BatchLoader
from hstu_dist.data.prefetch import prefetch
from hstu_dist.distributed.process_group import World, sum_over_ranks
from hstu_dist.train.state import TrainState
from hstu_dist.train.step import StepResult

_PREFETCH_BATCHES = 4


class Hook:
    """Something that happens around the loop; a hook overrides what it needs. Called on every rank."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process."""

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
        epochs: how many there are.
        world: this rank among the others.
        hooks: called in order.
        stop_requested: whether this rank was asked to stop (SIGTERM); the ranks agree before each step.
        interrupted: whether the loop ended because of such a request.
    """

    step: Callable[[JaggedBatch, int, tuple[int, int]], StepResult]
    loader: BatchLoader
    state: TrainState
    epochs: int
    world: World
    hooks: Sequence[Hook] = ()
    stop_requested: Callable[[], bool] = lambda: False
    interrupted: bool = field(default=False, init=False)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * len(self.loader)

    def fit(self) -> None:
        """Trains from `state` to the end."""
        for hook in self.hooks:
            hook.on_start(self)
        while self.state.epoch < self.epochs and not (self.state.stopped_early or self.interrupted):
            self._run_epoch()
        for hook in self.hooks:
            hook.on_stop(self)

    def _run_epoch(self) -> None:
        state = self.state
        for host_batch in prefetch(self.loader.epoch(state.epoch, state.batch), _PREFETCH_BATCHES):
            tokens, self.interrupted = self._agree(host_batch)
            if self.interrupted:
                return
            result = self.step(host_batch.to(self.world.device), tokens, (state.step, self.total_steps))
            state.batch, state.step, state.tokens = state.batch + 1, state.step + 1, state.tokens + tokens
            for hook in self.hooks:
                hook.after_step(self, result)
        state.epoch, state.batch = state.epoch + 1, 0
        for hook in self.hooks:
            hook.after_epoch(self)

    def _agree(self, batch: JaggedBatch) -> tuple[int, bool]:
        """Positions of all ranks' shares, and whether any rank was asked to stop."""
        mine = torch.tensor([batch.num_tokens, int(self.stop_requested())], device=self.world.device)
        tokens, stopping = sum_over_ranks(mine).tolist()
        return tokens, stopping > 0
