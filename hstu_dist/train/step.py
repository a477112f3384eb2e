"""One training step: look up what it needs once, the loss of each part of the batch, an update if all is finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.process_group import World
from hstu_dist.models.flops import Workload
from hstu_dist.ops.jagged import IdSet
from hstu_dist.train.optimizer import Optimizers
from hstu_dist.train.stopwatch import Stopwatch


class TrainedModel(Protocol):
    """What a step asks of a model."""

    def items(self, ids_U: Tensor) -> Tensor:
        """Rows [U, D] of the item table; their backward updates them."""

    def exchanging(self, wanted: bool) -> AbstractContextManager[None]:
        """Around a forward and its backward: whether this backward averages the gradients of all ranks."""


PartLoss = Callable[[Tensor], Tensor]
"""Rows [U, D] that the step looked up → scalar sum of losses over one part's predictions."""


class Objective(Protocol):
    """What a step minimises."""

    @property
    def model(self) -> TrainedModel:
        """What is trained."""

    def in_rows(self, batch: JaggedBatch) -> JaggedBatch:
        """A batch that is going to be trained on, its items as rows of the item table; all ranks call it together."""

    def plan(self, batch: JaggedBatch, work: Workload, step: int, num_parts: int) -> tuple[IdSet, Sequence[PartLoss]]:
        """What a step on a batch needs.

        Args:
            batch: this rank's share, of `in_rows`; may be empty.
            work: of all shares together.
            step: steps taken.
            num_parts: runs of sequences that the share is cut into.

        Returns:
            Items to look up, and the loss of each part.
        """


@dataclass(frozen=True)
class Refusal:
    """A step that was not taken, because a loss or a gradient of any rank was not finite.

    Attributes:
        batch: this rank's share, its items as rows.
        work: positions, attention pairs and context of all shares together.
        reason: the same on all ranks.
    """

    batch: JaggedBatch
    work: Workload
    reason: str


@dataclass(frozen=True)
class StepResult:
    """What a step reports.

    Attributes:
        loss_sum: this rank's sum of losses over its predictions; 0 for a refused step.
        work: positions, attention pairs and context of all ranks that were trained on; none for a refused step.
        learning_rate: of the dense part.
        forward_seconds: this rank's time for encoding and loss, which waits for no other rank.
        refusal: why nothing was updated, on all ranks alike; None for a step like any other.
    """

    loss_sum: float
    work: Workload
    learning_rate: float
    forward_seconds: float = 0.0
    refusal: Refusal | None = None


@dataclass(frozen=True)
class Gradient:
    """What a step computed before it updates anything; the dense part's gradient lies with its parameters.

    Attributes:
        loss_sum: this rank's sum of losses over its predictions.
        looked_up_UD: rows as they came from the table, whose backward updates it.
        rows_UD: the same rows with their gradient.
        seconds: for encoding and loss.
    """

    loss_sum: float
    looked_up_UD: Tensor
    rows_UD: Tensor
    seconds: float


class TrainStep:
    """Callable once per global batch, by all ranks together."""

    def __init__(self, objective: Objective, optimizers: Optimizers, world: World, micro_batches: int = 1) -> None:
        self.objective = objective
        self.optimizers = optimizers
        self.world = world
        self.micro_batches = micro_batches

    def __call__(self, batch: JaggedBatch, work: Workload, position: tuple[int, int | None]) -> StepResult:
        """Updates the model on one global batch, unless a loss or gradient of any rank is not finite, twice.

        Args:
            batch: this rank's share; may be empty.
            work: positions, attention pairs and context of all shares together.
            position: (steps taken, steps of the whole run, None if nobody knows).
        """
        step, total_steps = position
        factor = self.optimizers.prepare(step, total_steps)
        batch = self.objective.in_rows(batch)
        gradient = self.gradient(batch, work, step)
        reason = self._objection(gradient)
        if reason is not None:
            # what memory or an arithmetic unit got wrong once comes right now; what data or weights cause does not
            self.optimizers.take_back()
            # from the start: fbgemm counts look-ups, not steps
            self.optimizers.prepare(step, total_steps)
            gradient = self.gradient(batch, work, step)
            reason = self._objection(gradient)
        learning_rate = self.optimizers.config.learning_rate * factor
        if reason is not None:
            self.optimizers.take_back()
            return StepResult(0.0, Workload(), learning_rate, gradient.seconds, Refusal(batch, work, reason))
        with record_function("update"):
            gradient.looked_up_UD.backward(gradient.rows_UD.grad)
            self.optimizers.step()
        return StepResult(gradient.loss_sum, work, learning_rate, gradient.seconds)

    def gradient(self, batch: JaggedBatch, work: Workload, step: int) -> Gradient:
        """Loss and gradients of one global batch; nothing is updated. `batch` is of `in_rows`."""
        needed, losses = self.objective.plan(batch, work, step, self.micro_batches)
        # the names of the parts in a profile
        with record_function("look up"):
            rows_UD = self.objective.model.items(needed.ids)
        # the table updates its rows in the backward of their lookup: all parts add to one gradient before, and all
        # ranks agree that it is sound
        leaf_UD = rows_UD.detach().requires_grad_()
        watch = Stopwatch(self.world.device)
        value = self._accumulate(leaf_UD, losses, work, watch)
        return Gradient(value, rows_UD, leaf_UD, watch.seconds())

    def _objection(self, gradient: Gradient) -> str | None:
        """Why no rank may take the step; None if all may."""
        rows = gradient.rows_UD.grad
        assert rows is not None
        sound = self.optimizers.is_finite() and bool(torch.linalg.vector_norm(rows).isfinite())
        wrong = [not math.isfinite(gradient.loss_sum), not sound]
        # number of the last rank that objects, from 1
        last = torch.tensor([(self.world.rank + 1) * flag for flag in wrong], device=self.world.device)
        dist.all_reduce(last, dist.ReduceOp.MAX)
        loss, any_gradient = last.tolist()
        if loss:
            return f"the loss is not a finite number on rank {loss - 1}"
        return f"the gradient is not finite on rank {any_gradient - 1}" if any_gradient else None

    def _accumulate(self, rows_UD: Tensor, losses: Sequence[PartLoss], work: Workload, watch: Stopwatch) -> float:
        """Sum of losses over the parts, whose gradients reach `rows_UD`, a leaf, and the dense part.

        `watch` times the forwards.
        """
        total = rows_UD.new_zeros((), dtype=torch.float64)
        for number, loss in enumerate(losses, start=1):
            with self.objective.model.exchanging(number == len(losses)):
                watch.start()
                loss_sum = loss(rows_UD)
                watch.stop()
                total += loss_sum.detach()
                with record_function("backward"):
                    # gradients are averaged over ranks; the mean wanted is over all predictions of all ranks
                    (loss_sum * (self.world.size / max(1, work.targets))).backward()
        return float(total)
