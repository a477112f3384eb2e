"""HR@K, NDCG@K and MRR from exact ranks, as sums that add up across batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hstu_dist.ops.jagged import sequence_of

_CHUNK_ELEMENTS = 1 << 22

RankMetric = Callable[[Tensor], Tensor]
"""Values [B] float64 of exact ranks [B] int64 >= 1, to be averaged."""


def ranks_of_targets(
    users_BD: Tensor,
    items_VD: Tensor,
    target: Tensor,
    history: tuple[Tensor, Tensor],
    listed_V: Tensor | None = None,
) -> Tensor:
    """Rank of each user's target among all items, the user's own history left out.

    Items of equal score are ordered by id, smaller ids first, so that the rank does not depend on how a sort treats
    ties. The target itself is never left out, even if the history holds it. Scores that are no numbers put the target
    behind every item: a model that diverged must not look perfect.

    Args:
        users_BD: [B, D], one vector a user.
        items_VD: [V, D], the whole corpus.
        target: [B] int64 item ids.
        history: item ids [T] int64 of all users and their offsets [B+1] int64; what a user did before the first of
            them stays in the ranking.
        listed_V: [V] bool, items that take part, the targets among them; None: all.

    Returns:
        [B] int64, 1 for the best; V + 1 where the target's score is no number.
    """
    seen_ids, offsets = history
    owner = sequence_of(offsets)
    ranks = torch.ones_like(target)
    rows = max(1, _CHUNK_ELEMENTS // max(1, items_VD.shape[0]))
    ids = torch.arange(items_VD.shape[0], device=target.device)
    for start in range(0, target.numel(), rows):
        part = slice(start, start + rows)
        scores = users_BD[part] @ items_VD.T
        if listed_V is not None:
            scores.masked_fill_(~listed_V, -torch.inf)
        wanted = target[part, None]
        score = scores.gather(1, wanted)
        first, last = int(offsets[start]), int(offsets[min(start + rows, target.numel())])
        scores[owner[first:last] - start, seen_ids[first:last]] = -torch.inf
        # by what is not behind, so that NaN counts as better than the target
        behind = (scores < score) | ((scores == score) & (ids >= wanted))
        ranks[part] += (~behind).sum(1)
    return ranks


@dataclass(frozen=True)
class Measures:
    """What is measured of ranks.

    Attributes:
        cutoffs: K of HR@K and NDCG@K.
        more: metrics of the user's own by name.
    """

    cutoffs: tuple[int, ...]
    more: Mapping[str, RankMetric] = field(default_factory=dict)


@dataclass(frozen=True)
class RankingMetrics:
    """Sums over users; `values` divides. Adding two of them merges batches or ranks.

    Attributes:
        measures: what is measured.
        sums: [2 + 2 * cutoffs + more] float64: users, HR and NDCG sums, reciprocal ranks, sums of further metrics.
    """

    measures: Measures
    sums: Tensor

    @classmethod
    def of_ranks(cls, ranks: Tensor, measures: Measures) -> RankingMetrics:
        """Sums for ranks [B] int64 >= 1."""
        exact = ranks.to(torch.float64)
        sums = [exact.new_tensor(float(ranks.numel()))]
        for k in measures.cutoffs:
            hit = ranks <= k
            sums.append(hit.sum(dtype=torch.float64))
            sums.append((hit / torch.log2(exact + 1)).sum())
        sums.append(exact.reciprocal().sum())
        sums += [metric(ranks).sum(dtype=torch.float64) for metric in measures.more.values()]
        return cls(measures, torch.stack(sums))

    @classmethod
    def empty(cls, measures: Measures, device: torch.device) -> RankingMetrics:
        """Sums over no user."""
        size = 2 + 2 * len(measures.cutoffs) + len(measures.more)
        return cls(measures, torch.zeros(size, dtype=torch.float64, device=device))

    def __add__(self, other: RankingMetrics) -> RankingMetrics:
        if self.measures != other.measures:
            raise ValueError(f"measures: got {other.measures}, expected {self.measures}")
        return RankingMetrics(self.measures, self.sums + other.sums)

    @property
    def num_users(self) -> int:
        """Users that were counted."""
        return int(self.sums[0])

    def values(self) -> dict[str, float]:
        """Means over users: hr@K, ndcg@K, mrr, and the further ones.

        Raises:
            ValueError: no user was counted.
        """
        if self.num_users == 0:
            raise ValueError("ranking metrics: got no user, expected at least one to evaluate")
        names = [f"{metric}@{k}" for k in self.measures.cutoffs for metric in ("hr", "ndcg")]
        means = (self.sums[1:] / self.sums[0]).tolist()
        return dict(zip([*names, "mrr", *self.measures.more], means, strict=True))
