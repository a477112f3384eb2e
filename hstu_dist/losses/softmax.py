"""Sampled and full softmax over cosine similarities, without a [T, R, D] tensor.

Both work on a compact candidate table: the rows that this step needs, looked up once. Shapes: T positions,
C candidates, R negatives, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hstu_dist.ops.normalize import unit_rows

_MASKED = -5e4
"""Score of a negative that equals its positive (the public code's value)."""

_CHUNK_ELEMENTS = 1 << 21
"""Elements of one [chunk, C] block of scores: a few MiB, so that it stays in cache."""


@dataclass(frozen=True)
class Candidates:
    """What positions are scored against.

    Attributes:
        table: [C, D], rows of the item table, not normalised.
        positive: [T] int64, row of `table` that each position should find.
        negative: [T, R] int64, rows of `table`; None: all rows (full softmax).
    """

    table: Tensor
    positive: Tensor
    negative: Tensor | None


def softmax_loss(queries_TD: Tensor, candidates: Candidates, temperature: float) -> Tensor:
    """Sum over positions of -log softmax at the positive.

    Args:
        queries_TD: [T, D] unit vectors.
        candidates: positives and negatives.
        temperature: tau.

    Returns:
        Scalar: a sum, not a mean, because ranks hold different numbers of positions.
    """
    items_CD = unit_rows(candidates.table)
    loss: Tensor = _ChunkedSoftmax.apply(queries_TD, items_CD, candidates.positive, candidates.negative, temperature)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedSoftmax(torch.autograd.Function):
    """Computes loss and gradients chunk by chunk in the forward, so that no score outlives its chunk."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, items: Tensor, positive: Tensor, negative: Tensor | None, temperature: float
    ) -> Tensor:
        total = queries.new_zeros((), dtype=torch.float64)
        d_queries, d_items = torch.zeros_like(queries), torch.zeros_like(items)
        rows = max(1, _CHUNK_ELEMENTS // max(1, items.shape[0]))
        for start in range(0, queries.shape[0], rows):
            part = slice(start, start + rows)
            sampled = None if negative is None else negative[part]
            loss, d_scores = _chunk(queries[part] @ items.T / temperature, positive[part], sampled)
            total += loss
            d_scores /= temperature
            torch.mm(d_scores, items, out=d_queries[part])
            d_items.addmm_(d_scores.T, queries[part])
        ctx.save_for_backward(d_queries, d_items)
        return total.to(queries.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_queries, d_items = ctx.saved_tensors
        return d_queries * grad, d_items * grad, None, None, None


def _chunk(scores_tC: Tensor, positive: Tensor, negative: Tensor | None) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk and the gradient [t, C] of its scores."""
    target = positive[:, None]
    if negative is None:
        log_probability = scores_tC.log_softmax(dim=1)
        loss = -log_probability.gather(1, target).sum(dtype=torch.float64)
        d_scores = log_probability.exp_()
        d_scores.scatter_add_(1, target, d_scores.new_full(target.shape, -1.0))
        return loss, d_scores
    sampled = scores_tC.gather(1, negative).masked_fill_(negative == target, _MASKED)
    log_probability = torch.cat([scores_tC.gather(1, target), sampled], dim=1).log_softmax(dim=1)
    loss = -log_probability[:, 0].sum(dtype=torch.float64)
    probability = log_probability.exp_()
    probability[:, 0] -= 1.0
    d_scores = scores_tC.zero_()
    d_scores.scatter_add_(1, torch.cat([target, negative], dim=1), probability)
    return loss, d_scores
