"""Evaluation of held-out records: every target counts, among all items, by its rank and its share of the softmax.

Shapes: T tokens, P positions that count, V items, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.process_group import sum_over_ranks
from hstu_dist.distributed.recommender import Recommender
from hstu_dist.metrics.ranking import Measures, RankingMetrics, ranks_of_targets
from hstu_dist.ops.jagged import sequence_of
from hstu_dist.ops.normalize import unit_rows

LOSS = "loss"
"""Name of the metric: nats a target."""
_SCORES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class CountedTargets:
    """What is measured.

    Attributes:
        measures: of the ranks.
        temperature: of the softmax.
        last: targets of each record that count, the last ones; None: all.
    """

    measures: Measures
    temperature: float
    last: int | None = None

    def positions(self, offsets: Tensor) -> Tensor:
        """[P] int64 tokens whose targets count, of sequences [B+1]."""
        tokens = torch.arange(int(offsets[-1]), device=offsets.device)
        if self.last is None:
            return tokens
        return tokens[offsets[1:][sequence_of(offsets)] - tokens <= self.last]


@torch.no_grad()
def evaluate_targets(
    recommender: Recommender, batches: Iterable[JaggedBatch], counted: CountedTargets
) -> dict[str, float]:
    """Means over targets: hr@K, ndcg@K, mrr among all items, and `loss`, -log softmax over all items in nats.

    Args:
        recommender: what is evaluated.
        batches: this rank's share, as many as every rank has.
        counted: what is measured.

    Returns:
        Equal on every rank.
    """
    corpus_VD = recommender.corpus()
    items_VD = unit_rows(corpus_VD)
    measured = _Sums(counted, items_VD, items_VD)
    for host_batch in batches:
        batch = host_batch.to(items_VD.device)
        # also a share without sequences: a sharded tower needs all ranks
        measured.add(recommender.encode_local(corpus_VD[batch.item_ids], batch), batch)
    return measured.values()


@torch.no_grad()
def evaluate_target_popularity(
    counts_V: Tensor, batches: Iterable[JaggedBatch], counted: CountedTargets
) -> dict[str, float]:
    """The same for ranking all items by how often they occur in training, and predicting them in that proportion.

    Args:
        counts_V: [num_items] int64; each counts once more, so that none is impossible.
        batches: this rank's share.
        counted: what is measured; its temperature must be 1.
    """
    log_V1 = (counts_V + 1).to(torch.float64).log()[:, None]
    measured = _Sums(counted, counts_V.to(torch.float64)[:, None], log_V1)
    for host_batch in batches:
        batch = host_batch.to(counts_V.device)
        measured.add(log_V1.new_ones(batch.num_tokens, 1), batch)
    return measured.values()


class _Sums:
    """Sums over the targets of this rank."""

    def __init__(self, counted: CountedTargets, ranked_VD: Tensor, scored_VD: Tensor) -> None:
        self.counted = counted
        self.ranked_VD, self.scored_VD = ranked_VD, scored_VD
        self.metrics = RankingMetrics.empty(counted.measures, ranked_VD.device)
        self.nats = torch.zeros(1, dtype=torch.float64, device=ranked_VD.device)

    def add(self, vectors_TD: Tensor, batch: JaggedBatch) -> None:
        for rows in self._positions(batch):
            vectors_PD, target = vectors_TD[rows], batch.target_ids[rows]
            nobody = batch.item_ids[:0], torch.zeros(len(rows) + 1, dtype=torch.int64, device=target.device)
            ranks = ranks_of_targets(vectors_PD, self.ranked_VD, target, nobody)
            self.metrics += RankingMetrics.of_ranks(ranks, self.counted.measures)
            scores_PV = vectors_PD @ self.scored_VD.T / self.counted.temperature
            log_share = scores_PV.gather(1, target[:, None])[:, 0] - scores_PV.logsumexp(1)
            self.nats -= log_share.sum(dtype=torch.float64)

    def _positions(self, batch: JaggedBatch) -> Iterator[Tensor]:
        """Positions that count, a few at a time."""
        many = max(1, _SCORES_AT_ONCE // self.ranked_VD.shape[0])
        positions = self.counted.positions(batch.offsets)
        yield from (rows for rows in positions.split(many) if len(rows))

    def values(self) -> dict[str, float]:
        sums = sum_over_ranks(torch.cat([self.metrics.sums, self.nats]))
        total = RankingMetrics(self.counted.measures, sums[:-1])
        return {**total.values(), LOSS: float(sums[-1]) / max(1, total.num_users)}
