"""HR@K, NDCG@K and MRR from exact ranks, as sums that add up across batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_dist.ops.jagged import sequence_of

_CHUNK_ELEMENTS = 1 << 22


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
class RankingMetrics:
    """Sums over users; `values` divides. Adding two of them merges batches or ranks.

    Attributes:
        cutoffs: K of HR@K and NDCG@K.
        sums: [1 + 2 * len(cutoffs) + 1] float64: users, then HR and NDCG sums, then reciprocal ranks.
    """

    cutoffs: tuple[int, ...]
    sums: Tensor

    @classmethod
    def of_ranks(cls, ranks: Tensor, cutoffs: Sequence[int]) -> RankingMetrics:
        """Sums for ranks [B] int64 >= 1."""
        exact = ranks.to(torch.float64)
        sums = [exact.new_tensor(float(ranks.numel()))]
        for k in cutoffs:
            hit = ranks <= k
            sums.append(hit.sum(dtype=torch.float64))
            sums.append((hit / torch.log2(exact + 1)).sum())
        sums.append(exact.reciprocal().sum())
        return cls(tuple(cutoffs), torch.stack(sums))

    @classmethod
    def empty(cls, cutoffs: Sequence[int], device: torch.device) -> RankingMetrics:
        """Sums over no user."""
        return cls(tuple(cutoffs), torch.zeros(2 + 2 * len(cutoffs), dtype=torch.float64, device=device))

    def __add__(self, other: RankingMetrics) -> RankingMetrics:
        if self.cutoffs != other.cutoffs:
            raise ValueError(f"cutoffs: got {other.cutoffs}, expected {self.cutoffs}")
        return RankingMetrics(self.cutoffs, self.sums + other.sums)

    @property
    def num_users(self) -> int:
        """Users that were counted."""
        return int(self.sums[0])

    def values(self) -> dict[str, float]:
        """Means over users: hr@K, ndcg@K, mrr.

        Raises:
            ValueError: no user was counted.
        """
        if self.num_users == 0:
            raise ValueError("ranking metrics: got no user, expected at least one to evaluate")
        means = (self.sums[1:] / self.sums[0]).tolist()
        found = {}
        for index, k in enumerate(self.cutoffs):
            found[f"hr@{k}"] = means[2 * index]
            found[f"ndcg@{k}"] = means[2 * index + 1]
        found["mrr"] = means[-1]
        return found
