"""Sampled and full softmax over cosine similarities.

Both work on a compact candidate table: the rows that this step needs, looked up once. Shapes: T positions,
C candidates, R negatives, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_dist.losses.config import FullSoftmaxConfig, SampledSoftmaxConfig
from hstu_dist.ops import backends
from hstu_dist.ops import softmax_loss as op
from hstu_dist.ops.normalize import unit_rows
from hstu_dist.ops.softmax_spec import SoftmaxSpec


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


def softmax_spec(config: SampledSoftmaxConfig | FullSoftmaxConfig, num_items: int, device: torch.device) -> SoftmaxSpec:
    """What a configured objective asks of `ops.softmax_loss`, on the fastest backend of a device.

    Args:
        config: the objective.
        num_items: V, the items that negatives are drawn from.
        device: where the loss is computed.
    """
    log_expected_count = 0.0
    if isinstance(config, SampledSoftmaxConfig) and config.log_q_correction:
        log_expected_count = math.log(config.num_negatives / num_items)
    return SoftmaxSpec(
        temperature=config.temperature,
        log_expected_count=log_expected_count,
        backend=backends.fastest_softmax(device),
    )


def softmax_loss(queries_TD: Tensor, candidates: Candidates, spec: SoftmaxSpec) -> Tensor:
    """Sum over positions of -log softmax at the positive.

    Args:
        queries_TD: [T, D] unit vectors.
        candidates: positives and negatives.
        spec: chosen once, by `softmax_spec`.

    Returns:
        Scalar: a sum, not a mean, because ranks hold different numbers of positions.
    """
    items_CD = unit_rows(candidates.table)
    return op.softmax_loss(queries_TD, items_CD, candidates.positive, candidates.negative, spec)
