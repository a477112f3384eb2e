"""Share the sequences of a global batch out so that all ranks have the same work: the costliest first, to the idlest.

Every rank computes the same shares from the lengths alone; nothing is communicated.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CostLaw:
    """Work of a sequence of n inputs, linear * n + quadratic * n^2; any unit. The default counts tokens.

    Attributes:
        linear: of each input.
        quadratic: of each pair of inputs.
    """

    linear: float = 1.0
    quadratic: float = 0.0

    def of(self, lengths: Ints | Floats) -> Floats:
        """[B] float64, the cost of every sequence."""
        n = lengths.astype(np.float64)
        return n * (self.linear + self.quadratic * n)


@dataclass(frozen=True, kw_only=True)
class Imbalance:
    """How much longer the busiest rank works than the mean one, as a fraction of the mean.

    Attributes:
        before: sequences dealt out in turns.
        after: as they are shared out.
        bound: nobody can be below, because the costliest sequence is on one rank.
    """

    before: float
    after: float
    bound: float


def in_turns(costs: Floats, ranks: int) -> Ints:
    """[B] int64, the rank of every sequence whatever it costs: 0, 1, ..., 0, 1, ..."""
    return np.arange(len(costs)) % ranks


def by_cost(costs: Floats, ranks: int) -> Ints:
    """The costliest first, each to the rank with the least work.

    Args:
        costs: [B] of the sequences.
        ranks: > 0.

    Returns:
        [B] int64, the rank of every sequence.
    """
    heap = [(0.0, rank) for rank in range(ranks)]
    order = np.argsort(-costs, kind="stable")
    owners = []
    for cost in costs[order].tolist():
        work, rank = heap[0]
        owners.append(rank)
        heapq.heapreplace(heap, (work + cost, rank))
    return _in_original_order(owners, order)


def by_cost_and_count(costs: Floats, ranks: int) -> Ints:
    """As `by_cost`, but the numbers of sequences of two ranks differ by at most one.

    Args:
        costs: [B] of the sequences.
        ranks: > 0.

    Returns:
        [B] int64, the rank of every sequence.
    """
    share, larger_shares = divmod(len(costs), ranks)
    heap = [(0.0, rank) for rank in range(ranks)]
    counts = [0] * ranks
    order = np.argsort(-costs, kind="stable")
    owners = []
    for cost in costs[order].tolist():
        work, rank = heapq.heappop(heap)
        while counts[rank] == share and not larger_shares:
            work, rank = heapq.heappop(heap)
        owners.append(rank)
        counts[rank] += 1
        larger_shares -= counts[rank] > share
        if counts[rank] <= share:
            heapq.heappush(heap, (work + cost, rank))
    return _in_original_order(owners, order)


def imbalance(costs: Floats, owners: Ints, ranks: int) -> float:
    """Work of the busiest rank over the mean, minus 1; 0 without work."""
    work = np.bincount(owners, weights=costs, minlength=ranks)
    return float(work.max() / work.mean()) - 1.0 if work.any() else 0.0


def largest_item_bound(costs: Floats, ranks: int) -> float:
    """The least imbalance that the costliest sequence allows."""
    return max(0.0, float(costs.max() * ranks / costs.sum()) - 1.0) if costs.any() else 0.0


def _in_original_order(owners: list[int], order: Ints) -> Ints:
    result = np.empty(len(order), dtype=np.int64)
    result[order] = owners
    return result
