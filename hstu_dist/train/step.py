"""One training step: look up what it needs once, encode, score, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.process_group import World
from hstu_dist.distributed.recommender import Recommender
from hstu_dist.losses.config import FullSoftmaxConfig, SampledSoftmaxConfig
from hstu_dist.losses.softmax import Candidates, softmax_loss, softmax_spec
from hstu_dist.models.context import token_noise
from hstu_dist.models.flops import Workload
from hstu_dist.ops.jagged import IdSet
from hstu_dist.ops.random import TokenNoise, fold
from hstu_dist.train.optimizer import Optimizers
from hstu_dist.train.stopwatch import Stopwatch

_NEGATIVES = 2
_DROPOUT = 3

_DRAWS_OF_EVERYTHING = 8
"""Draws per item from which on a step looks up the whole table; one item in e^8 is missed."""


@dataclass(frozen=True)
class Refusal:
    """A step that was not taken, because a loss or a gradient of any rank was not finite.

    Attributes:
        batch: this rank's share.
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
        loss_sum: this rank's sum of losses over its positions; 0 for a refused step.
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
        loss_sum: this rank's sum of losses over its positions.
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

    def __init__(
        self,
        recommender: Recommender,
        loss: SampledSoftmaxConfig | FullSoftmaxConfig,
        optimizers: Optimizers,
        world: World,
        seed: int,
        micro_batches: int = 1,
    ) -> None:
        self.micro_batches = micro_batches
        self.recommender = recommender
        self.loss = loss
        self.softmax = softmax_spec(loss, recommender.num_items, world.device)
        self.optimizers = optimizers
        self.world = world
        self.seed = seed

    def __call__(self, batch: JaggedBatch, work: Workload, position: tuple[int, int | None]) -> StepResult:
        """Updates the model on one global batch, unless a loss or gradient of any rank is not finite, twice.

        Args:
            batch: this rank's share; may be empty.
            work: positions, attention pairs and context of all shares together.
            position: (steps taken, steps of the whole run, None if nobody knows).
        """
        step, total_steps = position
        factor = self.optimizers.prepare(step, total_steps)
        gradient = self.gradient(batch, work, step)
        reason = self._objection(gradient)
        if reason is not None:
            # what memory or an arithmetic unit got wrong once comes right now; what data or weights cause does not
            self.optimizers.dense.zero_grad()
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
        """Loss and gradients of one global batch; nothing is updated. Arguments as of a call."""
        # the names of the parts in a profile
        with record_function("draw"):
            negatives = self._negatives(batch, step)
        with record_function("look up"):
            needed = self._needed(batch, negatives, work)
            rows_UD = self.recommender.items(needed.ids)
        # the table updates its rows in the backward of their lookup: all parts add to one gradient before, and all
        # ranks agree that it is sound
        leaf_UD = rows_UD.detach().requires_grad_()
        watch = Stopwatch(self.world.device)
        value = self._accumulate(leaf_UD, needed, self._parts(batch, negatives), (step, work, watch))
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

    def _parts(self, batch: JaggedBatch, negatives: Tensor | None) -> list[tuple[JaggedBatch, Tensor | None]]:
        parts = batch.parts(self.micro_batches)
        if negatives is None:
            return [(part, None) for part in parts]
        return list(zip(parts, negatives.split([part.num_tokens - part.num_context for part in parts]), strict=True))

    def _accumulate(
        self,
        rows_UD: Tensor,
        needed: IdSet,
        parts: Sequence[tuple[JaggedBatch, Tensor | None]],
        position: tuple[int, Workload, Stopwatch],
    ) -> float:
        """Sum of losses over the parts, whose gradients reach `rows_UD` and the tower.

        Args:
            rows_UD: a leaf, the rows of `needed`.
            needed: ids of the step.
            parts: of this rank's share, each with its negatives.
            position: number of the step, work of all ranks, and what times the forwards.
        """
        step, work, watch = position
        total = rows_UD.new_zeros((), dtype=torch.float64)
        for number, (part, negatives) in enumerate(parts, start=1):
            with self.recommender.exchanging(number == len(parts)):
                watch.start()
                with record_function("encode"):
                    items_TD = rows_UD.index_select(0, needed.places(part.item_ids))
                    queries_TD = self.recommender.encode(items_TD, part, noise_key=fold(self.seed, step, _DROPOUT))
                with record_function("loss"):
                    places = None if negatives is None else needed.places(negatives)
                    targets = part.target_ids
                    if part.trained is not None:
                        queries_TD, targets = queries_TD[part.trained], targets[part.trained]
                    candidates = Candidates(rows_UD, needed.places(targets), places)
                    loss_sum = softmax_loss(queries_TD, candidates, self.softmax)
                watch.stop()
                total += loss_sum.detach()
                with record_function("backward"):
                    # gradients are averaged over ranks; the mean wanted is over all positions of all ranks
                    (loss_sum * (self.world.size / max(1, work.targets))).backward()
        return float(total)

    def _negatives(self, batch: JaggedBatch, step: int) -> Tensor | None:
        if isinstance(self.loss, FullSoftmaxConfig):
            return None
        noise = token_noise(batch, self.recommender.max_length, fold(self.seed, step, _NEGATIVES))
        if batch.trained is not None:
            noise = TokenNoise(noise.key, noise.tokens[batch.trained])
        return self.recommender.tower.rows.integers(noise, self.loss.num_negatives, self.recommender.num_items)

    def _needed(self, batch: JaggedBatch, negatives: Tensor | None, work: Workload) -> IdSet:
        num_items = self.recommender.num_items
        # where ranks draw each item many times over, finding the few that are missing costs more than it saves;
        # decided for all ranks together, so that the rows a step touches do not depend on their number
        if negatives is None or work.targets * negatives.shape[1] >= _DRAWS_OF_EVERYTHING * num_items:
            return IdSet.everything(num_items, batch.item_ids.device)
        return IdSet.of([batch.item_ids, batch.target_ids, negatives], num_items)
