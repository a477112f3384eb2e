"""The retrieval objective: the next item against sampled or all other items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor
from torch.profiler import record_function

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.recommender import Recommender
from hstu_dist.losses.config import FullSoftmaxConfig, PluginLossConfig, RetrievalLossConfig
from hstu_dist.losses.plugin import score_loss
from hstu_dist.losses.softmax import Candidates, softmax_loss, softmax_spec
from hstu_dist.models.context import token_noise
from hstu_dist.models.flops import Workload
from hstu_dist.ops.jagged import IdSet
from hstu_dist.ops.random import TokenNoise, fold
from hstu_dist.train.step import PartLoss

_NEGATIVES = 2
_DROPOUT = 3

_DRAWS_OF_EVERYTHING = 8
"""Draws per item from which on a step looks up the whole table; one item in e^8 is missed."""


@dataclass
class RetrievalObjective:
    """A loss of the item that follows each event against negatives; an `Objective` of `TrainStep`.

    Attributes:
        model: what is trained.
        loss: sampled or full softmax, or one of the user's own.
        seed: of dropout and negatives.
    """

    model: Recommender
    loss: RetrievalLossConfig
    seed: int
    _sum: Callable[[Tensor, Candidates], Tensor] = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.loss, PluginLossConfig):
            self._sum = score_loss(self.loss)
        else:
            device = next(self.model.tower.parameters()).device
            spec = softmax_spec(self.loss, self.model.num_items, device)
            self._sum = partial(softmax_loss, spec=spec)

    def in_rows(self, batch: JaggedBatch) -> JaggedBatch:
        """As `Objective.in_rows`."""
        with record_function("vocabulary"):
            return self.model.in_rows(batch, admit=True)[0]

    def plan(self, batch: JaggedBatch, work: Workload, step: int, num_parts: int) -> tuple[IdSet, Sequence[PartLoss]]:
        """As `Objective.plan`."""
        # the names of the parts in a profile
        with record_function("draw"):
            negatives = self._negatives(batch, step)
            needed = self._needed(batch, negatives, work)
        parts = batch.parts(num_parts)
        sizes = [part.num_tokens - part.num_context for part in parts]
        drawn = [None] * num_parts if negatives is None else negatives.split(sizes)
        losses = (partial(self._loss, needed, (part, own), step) for part, own in zip(parts, drawn, strict=True))
        return needed, list(losses)

    def _loss(self, needed: IdSet, part: tuple[JaggedBatch, Tensor | None], step: int, rows_UD: Tensor) -> Tensor:
        """Sum of -log softmax over the positions of a part that count, a batch with its negatives."""
        batch, negatives = part
        with record_function("encode"):
            items_TD = rows_UD.index_select(0, needed.places(batch.item_ids))
            queries_TD = self.model.encode(items_TD, batch, noise_key=fold(self.seed, step, _DROPOUT))
        with record_function("loss"):
            places = None if negatives is None else needed.places(negatives)
            targets = batch.target_ids
            if batch.trained is not None:
                queries_TD, targets = queries_TD[batch.trained], targets[batch.trained]
            candidates = Candidates(rows_UD, needed.places(targets), places)
            return self._sum(queries_TD, candidates)

    def _negatives(self, batch: JaggedBatch, step: int) -> Tensor | None:
        if isinstance(self.loss, FullSoftmaxConfig):
            return None
        noise = token_noise(batch, self.model.max_length, fold(self.seed, step, _NEGATIVES))
        if batch.trained is not None:
            noise = TokenNoise(noise.key, noise.tokens[batch.trained])
        rows, draw = self.model.listed_rows(), self.model.tower.rows.integers
        if rows is None or not rows.numel():
            return draw(noise, self.loss.num_negatives, self.model.num_items)
        # rows that nobody has yet would be wasted
        return rows[draw(noise, self.loss.num_negatives, rows.numel())].long()

    def _needed(self, batch: JaggedBatch, negatives: Tensor | None, work: Workload) -> IdSet:
        num_items = self.model.num_items
        # where ranks draw each item many times over, finding the few that are missing costs more than it saves;
        # decided for all ranks together, so that the rows a step touches do not depend on their number
        if negatives is None or work.targets * negatives.shape[1] >= _DRAWS_OF_EVERYTHING * num_items:
            return IdSet.everything(num_items, batch.item_ids.device)
        return IdSet.of([batch.item_ids, batch.target_ids, negatives], num_items)
