"""One training step: look up what it needs once, the loss of each part of the batch, an update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.process_group import World
from hstu_dist.errors import UserError
from hstu_dist.models.flops import Workload
from hstu_dist.ops.jagged import IdSet
from hstu_dist.train.optimizer import Optimizers


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

    def plan(self, batch: JaggedBatch, work: Workload, step: int, num_parts: int) -> tuple[IdSet, Sequence[PartLoss]]:
        """What a step on a batch needs.

        Args:
            batch: this rank's share; may be empty.
            work: of all shares together.
            step: steps taken.
            num_parts: runs of sequences that the share is cut into.

        Returns:
            Items to look up, and the loss of each part.
        """


@dataclass(frozen=True)
class StepResult:
    """What a step reports.

    Attributes:
        loss_sum: this rank's sum of losses over its predictions.
        work: of all ranks.
        learning_rate: of the dense part.
    """

    loss_sum: float
    work: Workload
    learning_rate: float


class TrainStep:
    """Callable once per global batch, by all ranks together."""

    def __init__(self, objective: Objective, optimizers: Optimizers, world: World, micro_batches: int = 1) -> None:
        self.objective = objective
        self.optimizers = optimizers
        self.world = world
        self.micro_batches = micro_batches

    def __call__(self, batch: JaggedBatch, work: Workload, position: tuple[int, int | None]) -> StepResult:
        """Updates the model on one global batch.

        Args:
            batch: this rank's share; may be empty.
            work: of all shares together.
            position: (steps taken, steps of the whole run, None if nobody knows).

        Raises:
            UserError: the loss is NaN or infinite.
        """
        step, total_steps = position
        factor = self.optimizers.prepare(step, total_steps)
        needed, losses = self.objective.plan(batch, work, step, self.micro_batches)
        # the names of the parts in a profile
        with record_function("look up"):
            rows_UD = self.objective.model.items(needed.ids)
        # the table updates its rows in the backward of their lookup: all parts add to one gradient before
        leaf_UD = rows_UD.detach().requires_grad_()
        value = self._accumulate(leaf_UD, losses, work)
        if not math.isfinite(value):
            raise UserError(
                f"step {step}: the loss is {value} on rank {self.world.rank}",
                "lower the learning rates or set optimizer.clip_norm, then continue from an earlier checkpoint",
            )
        with record_function("update"):
            rows_UD.backward(leaf_UD.grad)
            self.optimizers.step()
        return StepResult(value, work, self.optimizers.config.learning_rate * factor)

    def _accumulate(self, rows_UD: Tensor, losses: Sequence[PartLoss], work: Workload) -> float:
        """Sum of losses over the parts, whose gradients reach `rows_UD`, a leaf, and the dense part."""
        total = rows_UD.new_zeros((), dtype=torch.float64)
        for number, loss in enumerate(losses, start=1):
            with self.objective.model.exchanging(number == len(losses)):
                loss_sum = loss(rows_UD)
                total += loss_sum.detach()
                # gradients are averaged over ranks; the mean wanted is over all predictions of all ranks
                (loss_sum * (self.world.size / max(1, work.targets))).backward()
        return float(total)
