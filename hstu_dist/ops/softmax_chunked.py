"""Softmax losses by matrix products over chunks of positions: any device, memory bounded.

Shapes: T positions, C candidates, R negatives, D width; a chunk has t positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_dist.ops.softmax_spec import MASKED, LossAndGradients, SoftmaxSpec

_CHUNK_ELEMENTS = 1 << 21
"""Elements of one [t, C] block of scores: a few MiB, so that it stays in cache."""


def loss_and_gradients(
    queries_TD: Tensor, items_CD: Tensor, positive_T: Tensor, negative_TR: Tensor | None, spec: SoftmaxSpec
) -> LossAndGradients:
    """As in SoftmaxKernel."""
    total = queries_TD.new_zeros((), dtype=torch.float64)
    d_queries, d_items = torch.zeros_like(queries_TD), torch.zeros_like(items_CD)
    pull_T = queries_TD.new_empty(queries_TD.shape[0])
    rows = max(1, _CHUNK_ELEMENTS // max(1, items_CD.shape[0]))
    for start in range(0, queries_TD.shape[0], rows):
        part = slice(start, start + rows)
        scores_tC = queries_TD[part] @ items_CD.T / spec.temperature
        if negative_TR is None:
            found_t, d_scores_tC = _full(scores_tC, positive_T[part])
        else:
            found_t, d_scores_tC = _sampled(scores_tC, positive_T[part], negative_TR[part], spec.log_expected_count)
        total -= found_t.sum(dtype=torch.float64)
        pull_T[part] = found_t.expm1() / spec.temperature
        d_scores_tC /= spec.temperature
        torch.mm(d_scores_tC, items_CD, out=d_queries[part])
        d_items.addmm_(d_scores_tC.T, queries_TD[part])
    # positives last: their shares are by far the largest, and what is added to them is rounded to their size
    d_queries += pull_T[:, None] * items_CD.index_select(0, positive_T)
    d_items.index_add_(0, positive_T, pull_T[:, None] * queries_TD)
    return LossAndGradients(total.to(queries_TD.dtype), d_queries, d_items)


def _full(scores_tC: Tensor, positive_t: Tensor) -> tuple[Tensor, Tensor]:
    """Log probability [t] of the positives, and the gradient [t, C] of the scores of all others."""
    target = positive_t[:, None]
    log_probability = scores_tC.log_softmax(dim=1)
    found_t1 = log_probability.gather(1, target)
    return found_t1[:, 0], log_probability.exp_().scatter_(1, target, 0.0)


def _sampled(scores_tC: Tensor, positive_t: Tensor, negative_tR: Tensor, correction: float) -> tuple[Tensor, Tensor]:
    """As `_full`, among the positive and its negatives only."""
    target = positive_t[:, None]
    masked = negative_tR == target
    sampled = scores_tC.gather(1, negative_tR).sub_(correction).masked_fill_(masked, MASKED)
    log_probability = torch.cat([scores_tC.gather(1, target), sampled], dim=1).log_softmax(dim=1)
    weights_tR = log_probability[:, 1:].exp().masked_fill_(masked, 0.0)
    return log_probability[:, 0], scores_tC.zero_().scatter_add_(1, negative_tR, weights_tR)
