"""Generative ranking: its objective, its evaluation, and what item averages would give.

Shapes: E events, K heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.profiler import record_function

from hstu_dist.actions import ActionField
from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.process_group import gather_rows, sum_over_ranks
from hstu_dist.distributed.ranker import Ranker
from hstu_dist.losses.config import HeadConfig
from hstu_dist.losses.multi_task import labels_of, multi_task_loss
from hstu_dist.metrics.prediction import BinaryPredictions, RegressionSums
from hstu_dist.models.flops import Workload
from hstu_dist.ops.jagged import IdSet, sequence_of
from hstu_dist.ops.random import fold
from hstu_dist.train.step import PartLoss

_DROPOUT = 3

_PRIOR_EVENTS = 10.0
"""Events of the average item that an item's own average is smoothed with."""


@dataclass(frozen=True)
class HeadSet:
    """The heads of a run beside the fields of the action word that they predict.

    Attributes:
        configs: K of them.
        fields: K of them.
    """

    configs: tuple[HeadConfig, ...]
    fields: tuple[ActionField, ...]

    def labels(self, words_E: Tensor) -> Tensor:
        """[E, K] float32 of action words [E]."""
        return labels_of(words_E, self.configs, self.fields)


@dataclass(frozen=True)
class RankingObjective:
    """Multi-task loss of every event's action; an `Objective` of `TrainStep`.

    Attributes:
        model: what is trained.
        heads: what it predicts.
        seed: of dropout.
    """

    model: Ranker
    heads: HeadSet
    seed: int

    def in_rows(self, batch: JaggedBatch) -> JaggedBatch:
        """As it is: ranking has static vocabularies only."""
        return batch

    def plan(self, batch: JaggedBatch, work: Workload, step: int, num_parts: int) -> tuple[IdSet, Sequence[PartLoss]]:
        """As `Objective.plan`."""
        needed = IdSet.of([batch.item_ids], self.model.shape.num_items)
        return needed, [partial(self._loss, needed, part, step) for part in batch.parts(num_parts)]

    def _loss(self, needed: IdSet, batch: JaggedBatch, step: int, rows_UD: Tensor) -> Tensor:
        """Sum of losses over the events of a part."""
        # the names of the parts in a profile
        with record_function("encode"):
            items_ED = rows_UD.index_select(0, needed.places(batch.item_ids))
            predicted_EK = self.model.predict(items_ED, batch, noise_key=fold(self.seed, step, _DROPOUT))
        with record_function("loss"):
            labels_EK = self.heads.labels(batch.actions)
            if batch.trained is not None:
                predicted_EK, labels_EK = predicted_EK[batch.trained], labels_EK[batch.trained]
            return multi_task_loss(predicted_EK, labels_EK, self.heads.configs)


@torch.no_grad()
def evaluate_ranking(
    ranker: Ranker, batches: Iterable[JaggedBatch], heads: HeadSet, scored_after: int
) -> dict[str, float]:
    """Metrics of the predictions of all ranks' events after a moment; earlier events are history only.

    Args:
        ranker: what is evaluated.
        batches: this rank's share, as many as every rank has; every user is on exactly one rank.
        heads: what is predicted.
        scored_after: seconds; events at this time or before do not count.

    Returns:
        `<head>/<metric>`, equal on every rank.
    """
    corpus_VD = ranker.corpus()
    tally = _Tally.empty(heads, corpus_VD.device)
    for host_batch in batches:
        batch = host_batch.to(corpus_VD.device)
        # also a share without sequences: a sharded tower needs all ranks
        tally.add(ranker.predict_local(corpus_VD[batch.item_ids], batch), batch, scored_after)
    return tally.values()


@torch.no_grad()
def evaluate_item_averages(
    averages_VK: Tensor, batches: Iterable[JaggedBatch], heads: HeadSet, scored_after: int
) -> dict[str, float]:
    """As `evaluate_ranking`, for predicting each head's average over the item's training events.

    Args:
        averages_VK: [num_items, K], by `item_averages`.
        batches: this rank's share.
        heads: what is predicted.
        scored_after: seconds.
    """
    tally = _Tally.empty(heads, averages_VK.device)
    for host_batch in batches:
        batch = host_batch.to(averages_VK.device)
        tally.add(averages_VK[batch.item_ids], batch, scored_after)
    return tally.values()


def item_averages(item_ids: Tensor, labels_EK: Tensor, heads: Sequence[HeadConfig], num_items: int) -> Tensor:
    """Mean label of each item, smoothed towards that of all events; of binary heads as logits.

    Args:
        item_ids: [E] int64, of training events.
        labels_EK: [E, K].
        heads: K of them.
        num_items: V.

    Returns:
        [V, K] float64.
    """
    exact = labels_EK.to(torch.float64)
    overall = exact.mean(dim=0)
    sums = exact.new_zeros(num_items, exact.shape[1]).index_add_(0, item_ids, exact)
    counts = torch.bincount(item_ids, minlength=num_items)[:, None]
    averages = (sums + _PRIOR_EVENTS * overall) / (counts + _PRIOR_EVENTS)
    binary = torch.tensor([head.kind == "binary" for head in heads], device=averages.device)
    return torch.where(binary, averages.where(binary, 0.5).logit(), averages)


@dataclass
class _Tally:
    """Predictions so far, one part a head."""

    heads: HeadSet
    binary: dict[int, BinaryPredictions]
    regression: dict[int, RegressionSums]

    @classmethod
    def empty(cls, heads: HeadSet, device: torch.device) -> _Tally:
        kinds = [head.kind for head in heads.configs]
        return cls(
            heads,
            {k: BinaryPredictions.empty(device) for k, kind in enumerate(kinds) if kind == "binary"},
            {k: RegressionSums.empty(device) for k, kind in enumerate(kinds) if kind == "regression"},
        )

    def add(self, predicted_EK: Tensor, batch: JaggedBatch, scored_after: int) -> None:
        scored = batch.timestamps > scored_after
        predicted_EK, labels_EK = predicted_EK[scored], self.heads.labels(batch.actions[scored])
        users = batch.row_ids[sequence_of(batch.offsets)][scored]
        for k in self.binary:
            self.binary[k] += BinaryPredictions(predicted_EK[:, k], labels_EK[:, k] > 0.5, users)
        for k in self.regression:
            head = self.heads.configs[k]
            in_units = predicted_EK[:, k].to(torch.float64) * head.scale, labels_EK[:, k].to(torch.float64) * head.scale
            self.regression[k] += RegressionSums.of(*in_units)

    def values(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for k, head in enumerate(self.heads.configs):
            if k in self.binary:
                mine = self.binary[k]
                whole = BinaryPredictions(gather_rows(mine.logits), gather_rows(mine.labels), gather_rows(mine.groups))
                values = whole.values()
            else:
                values = RegressionSums(sum_over_ranks(self.regression[k].sums)).values()
            found |= {f"{head.name}/{metric}": value for metric, value in values.items()}
        return found
