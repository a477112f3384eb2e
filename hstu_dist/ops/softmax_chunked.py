"""Softmax losses by matrix products over chunks of positions: any device, memory bounded.

A position is scored against all candidates, or against its own negatives only where those are few among them.

Shapes: T positions, C candidates, R negatives, D width; a chunk has t positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_dist.ops.softmax_spec import MASKED, LossAndGradients, SoftmaxSpec

_CHUNK_ELEMENTS = 1 << 21
"""Elements of one block, [t, C] scores or [t, R, D] rows: a few MiB, so that it stays in cache."""

_ROWS_ABOVE = 64
"""Candidates per negative of a position above which rows of negatives are gathered. Scores of all candidates take
C / R times the arithmetic but no copies of rows: on a CPU equally slow at ratios of 30 (D = 64) to 80 (D = 256)."""


def loss_and_gradients(
    queries_TD: Tensor, items_CD: Tensor, positive_T: Tensor, negative_TR: Tensor | None, spec: SoftmaxSpec
) -> LossAndGradients:
    """As in SoftmaxKernel."""
    total = queries_TD.new_zeros((), dtype=torch.float64)
    d_queries, d_items = torch.zeros_like(queries_TD), torch.zeros_like(items_CD)
    pull_T = queries_TD.new_empty(queries_TD.shape[0])
    C, D = items_CD.shape
    R = C if negative_TR is None else negative_TR.shape[1]
    by_rows = _ROWS_ABOVE * R < C
    chunk = max(1, _CHUNK_ELEMENTS // max(1, R * D if by_rows else C))
    for start in range(0, queries_TD.shape[0], chunk):
        part = slice(start, start + chunk)
        queries_tD, positive_t = queries_TD[part], positive_T[part]
        negative_tR = None if negative_TR is None else negative_TR[part]
        if negative_tR is not None and by_rows:
            found_t, d_queries[part] = _by_rows(queries_tD, items_CD, positive_t, negative_tR, spec, d_items)
        else:
            found_t, d_queries[part] = _by_products(queries_tD, items_CD, positive_t, negative_tR, spec, d_items)
        total -= found_t.sum(dtype=torch.float64)
        pull_T[part] = found_t.expm1() / spec.temperature
    # positives last: their shares are by far the largest, and what is added to them is rounded to their size
    d_queries += pull_T[:, None] * items_CD.index_select(0, positive_T)
    d_items.index_add_(0, positive_T, pull_T[:, None] * queries_TD)
    return LossAndGradients(total.to(queries_TD.dtype), d_queries, d_items)


def _by_products(
    queries_tD: Tensor,
    items_CD: Tensor,
    positive_t: Tensor,
    negative_tR: Tensor | None,
    spec: SoftmaxSpec,
    d_items_CD: Tensor,
) -> tuple[Tensor, Tensor]:
    """Log probability [t] of the positives, and the gradient [t, D] that all others give; adds theirs to the items'."""
    scores_tC = queries_tD @ items_CD.T / spec.temperature
    target = positive_t[:, None]
    if negative_tR is None:
        found_t, d_scores_tC = _full(scores_tC, target)
    else:
        masked = negative_tR == target
        scores_tR = scores_tC.gather(1, negative_tR)
        found_t, weights_tR = _sampled(scores_tC.gather(1, target), scores_tR, masked, spec.log_expected_count)
        d_scores_tC = scores_tC.zero_().scatter_add_(1, negative_tR, weights_tR)
    d_scores_tC /= spec.temperature
    d_items_CD.addmm_(d_scores_tC.T, queries_tD)
    return found_t, d_scores_tC @ items_CD


def _by_rows(
    queries_tD: Tensor, items_CD: Tensor, positive_t: Tensor, negative_tR: Tensor, spec: SoftmaxSpec, d_items_CD: Tensor
) -> tuple[Tensor, Tensor]:
    """As `_by_products`, without scores of candidates that a position has not drawn."""
    rows_tRD = items_CD[negative_tR]
    scores_tR = torch.bmm(rows_tRD, queries_tD[:, :, None])[:, :, 0] / spec.temperature
    target_t1 = (queries_tD * items_CD[positive_t]).sum(1, keepdim=True) / spec.temperature
    masked = negative_tR == positive_t[:, None]
    found_t, weights_tR = _sampled(target_t1, scores_tR, masked, spec.log_expected_count)
    weights_tR /= spec.temperature
    d_queries_tD = torch.bmm(weights_tR[:, None], rows_tRD)[:, 0]
    d_rows_tRD = torch.mul(weights_tR[:, :, None], queries_tD[:, None], out=rows_tRD)
    d_items_CD.index_add_(0, negative_tR.flatten(), d_rows_tRD.flatten(0, 1))
    return found_t, d_queries_tD


def _full(scores_tC: Tensor, target_t1: Tensor) -> tuple[Tensor, Tensor]:
    """Log probability [t] of the positives, and the gradient [t, C] of the scores of all others."""
    log_probability = scores_tC.log_softmax(dim=1)
    found_t1 = log_probability.gather(1, target_t1)
    return found_t1[:, 0], log_probability.exp_().scatter_(1, target_t1, 0.0)


def _sampled(found_t1: Tensor, scores_tR: Tensor, masked_tR: Tensor, correction: float) -> tuple[Tensor, Tensor]:
    """As `_full`, among the positive and its negatives only; the gradient is [t, R]."""
    scores_tR.sub_(correction).masked_fill_(masked_tR, MASKED)
    log_probability = torch.cat([found_t1, scores_tR], dim=1).log_softmax(dim=1)
    return log_probability[:, 0], log_probability[:, 1:].exp().masked_fill_(masked_tR, 0.0)
