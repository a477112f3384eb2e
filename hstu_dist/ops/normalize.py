"""Rows scaled to unit length: outputs and item vectors are compared by cosine."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_SMALLEST_LENGTH = 1e-6


def unit_rows(x_TD: Tensor) -> Tensor:
    """X / max(|x|, 1e-6) for each row of [T, D]."""
    return F.normalize(x_TD, dim=1, eps=_SMALLEST_LENGTH)
