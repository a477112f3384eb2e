"""One training step: the loss of a global batch, its gradients, an update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.profiler import record_function

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.process_group import World
from hstu_dist.errors import UserError
from hstu_dist.models.flops import Workload
from hstu_dist.train.optimizer import Optimizers

Objective = Callable[[JaggedBatch, Workload, int], Tensor]
"""(this rank's share, work of all shares together, step) → scalar sum of losses over this rank's predictions.

It looks the item table up exactly once: that lookup updates the rows inside the backward.
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

    def __init__(self, objective: Objective, optimizers: Optimizers, world: World) -> None:
        self.objective = objective
        self.optimizers = optimizers
        self.world = world

    def __call__(self, batch: JaggedBatch, work: Workload, position: tuple[int, int]) -> StepResult:
        """Updates the model on one global batch.

        Args:
            batch: this rank's share; may be empty.
            work: of all shares together.
            position: (steps taken, steps of the whole run).

        Raises:
            UserError: the loss is NaN or infinite.
        """
        step, total_steps = position
        factor = self.optimizers.prepare(step, total_steps)
        loss_sum = self.objective(batch, work, step)
        value = float(loss_sum.detach())
        if value != value or value in (float("inf"), float("-inf")):
            raise UserError(
                f"step {step}: the loss is {value} on rank {self.world.rank}",
                "lower the learning rates or set optimizer.clip_norm, then continue from an earlier checkpoint",
            )
        # DDP and TorchRec average gradients over ranks; the mean wanted is over all predictions of all ranks
        (loss_sum * (self.world.size / max(1, work.predictions))).backward()
        with record_function("update"):
            self.optimizers.step()
        return StepResult(value, work, self.optimizers.config.learning_rate * factor)
