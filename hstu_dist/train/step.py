"""One training step: look up what it needs once, encode, score, update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.process_group import World
from hstu_dist.distributed.recommender import Recommender
from hstu_dist.errors import UserError
from hstu_dist.losses.config import FullSoftmaxConfig, SampledSoftmaxConfig
from hstu_dist.losses.softmax import Candidates, softmax_loss
from hstu_dist.models.context import token_noise
from hstu_dist.ops.jagged import IdSet
from hstu_dist.ops.random import fold
from hstu_dist.train.optimizer import Optimizers

_NEGATIVES = 2
_DROPOUT = 3


@dataclass(frozen=True)
class StepResult:
    """What a step reports.

    Attributes:
        loss_sum: this rank's sum of losses over its positions.
        tokens: positions of all ranks.
        learning_rate: of the dense part.
    """

    loss_sum: float
    tokens: int
    learning_rate: float


class TrainStep:
    """Callable once per global batch, by all ranks together."""

    def __init__(
        self,
        recommender: Recommender,
        loss: SampledSoftmaxConfig | FullSoftmaxConfig,
        optimizers: Optimizers,
        world: World,
        seed: int,
    ) -> None:
        self.recommender = recommender
        self.loss = loss
        self.optimizers = optimizers
        self.world = world
        self.seed = seed

    def __call__(self, batch: JaggedBatch, global_tokens: int, position: tuple[int, int]) -> StepResult:
        """Updates the model on one global batch.

        Args:
            batch: this rank's share; may be empty.
            global_tokens: positions of all shares together.
            position: (steps taken, steps of the whole run).

        Raises:
            UserError: the loss is NaN or infinite.
        """
        step, total_steps = position
        factor = self.optimizers.prepare(step, total_steps)
        negatives = self._negatives(batch, step)
        needed = self._needed(batch, negatives)
        rows_UD = self.recommender.table(needed.ids)
        queries_TD = self.recommender.encode(
            rows_UD[needed.places(batch.item_ids)], batch, noise_key=fold(self.seed, step, _DROPOUT)
        )
        candidates = Candidates(
            rows_UD, needed.places(batch.target_ids), None if negatives is None else needed.places(negatives)
        )
        loss_sum = softmax_loss(queries_TD, candidates, self.loss.temperature)
        value = float(loss_sum.detach())
        if value != value or value in (float("inf"), float("-inf")):
            raise UserError(
                f"step {step}: the loss is {value} on rank {self.world.rank}",
                "lower the learning rates or set optimizer.clip_norm, then continue from an earlier checkpoint",
            )
        # DDP and TorchRec average gradients over ranks; the mean wanted is over all positions of all ranks
        (loss_sum * (self.world.size / max(1, global_tokens))).backward()
        self.optimizers.step()
        return StepResult(value, global_tokens, self.optimizers.config.learning_rate * factor)

    def _negatives(self, batch: JaggedBatch, step: int) -> Tensor | None:
        if isinstance(self.loss, FullSoftmaxConfig):
            return None
        noise = token_noise(batch, self.recommender.max_length, fold(self.seed, step, _NEGATIVES))
        return noise.integers(self.loss.num_negatives, self.recommender.num_items)

    def _needed(self, batch: JaggedBatch, negatives: Tensor | None) -> IdSet:
        num_items = self.recommender.num_items
        if negatives is None:
            return IdSet([torch.arange(num_items, device=batch.item_ids.device)], num_items)
        return IdSet([batch.item_ids, batch.target_ids, negatives], num_items)
