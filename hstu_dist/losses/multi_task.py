"""Multi-task losses of ranking: binary cross-entropy and squared error over the heads' predictions.

Shapes: E events, K heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_dist.actions import ActionField
from hstu_dist.losses.config import HeadConfig


def head_fields(heads: Sequence[HeadConfig], fields: Sequence[ActionField]) -> tuple[ActionField, ...]:
    """The field of the action word that each head predicts.

    Raises:
        ValueError: a head names no field of the data.
    """
    by_name = {field.name: field for field in fields}
    for head in heads:
        if head.column not in by_name:
            raise ValueError(f"head {head.name}: got column {head.column}, the data has {', '.join(by_name)}")
    return tuple(by_name[head.column] for head in heads)


def labels_of(words_E: Tensor, heads: Sequence[HeadConfig], fields: Sequence[ActionField]) -> Tensor:
    """What the heads should predict.

    Args:
        words_E: [E] int32, action words.
        heads: K of them.
        fields: field of each head, by `head_fields`.

    Returns:
        [E, K] float32: 0 or 1 for binary heads, (transform(action) - offset) / scale for regressions.
    """
    columns = []
    for head, field in zip(heads, fields, strict=True):
        values: Tensor = field.of(words_E)
        if head.kind == "binary":
            columns.append((values >= head.threshold).to(torch.float32))
        else:
            exact = values.to(torch.float64)
            exact = torch.log1p(exact) if head.transform == "log1p" else exact
            columns.append(((exact - head.offset) / head.scale).to(torch.float32))
    return torch.stack(columns, dim=1)


def answers_of(predicted_EK: Tensor, heads: Sequence[HeadConfig]) -> Tensor:
    """What the heads predict, for people: probabilities of binary heads, of regressions the action itself.

    Args:
        predicted_EK: [E, K] logits of binary heads, normalised values of regressions.
        heads: K of them.

    Returns:
        [E, K] float64.
    """
    columns = []
    for index, head in enumerate(heads):
        predicted = predicted_EK[:, index].to(torch.float64)
        if head.kind == "binary":
            columns.append(predicted.sigmoid())
        else:
            values = predicted * head.scale + head.offset
            columns.append(torch.expm1(values) if head.transform == "log1p" else values)
    return torch.stack(columns, dim=1)


def multi_task_loss(predicted_EK: Tensor, labels_EK: Tensor, heads: Sequence[HeadConfig]) -> Tensor:
    """Sum over events and heads of weight x (binary cross-entropy or squared error).

    Args:
        predicted_EK: [E, K] logits of binary heads, normalised values of regressions.
        labels_EK: [E, K], by `labels_of`.
        heads: K of them.

    Returns:
        Scalar: a sum, not a mean, because ranks hold different numbers of events.
    """
    total = predicted_EK.new_zeros(())
    for index, head in enumerate(heads):
        predicted, label = predicted_EK[:, index], labels_EK[:, index]
        if head.kind == "binary":
            loss = F.binary_cross_entropy_with_logits(predicted, label, reduction="sum")
        else:
            loss = F.mse_loss(predicted, label, reduction="sum")
        total = total + head.weight * loss
    return total
