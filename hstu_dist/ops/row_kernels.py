"""Row kernels in plain PyTorch: any device, any dtype, and what the native ones are tested against.

Shapes: T rows, W columns. Forward and backward are separate functions, because `rows` decides what to save.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_dist.ops.random import Drop, TokenNoise


class RowKernels(Protocol):
    """What a set of row kernels offers; this module and `native_rows` are the two."""

    def normalize(self, x_TW: Tensor, epsilon: float) -> Tensor:
        """(x - mean) / sqrt(variance + epsilon) of each row."""

    def normalize_backward(self, x_TW: Tensor, grad_TW: Tensor, epsilon: float) -> Tensor:
        """Gradient of x, given that of `normalize`."""

    def silu(self, x_TW: Tensor) -> Tensor:
        """X * sigmoid(x)."""

    def silu_backward(self, x_TW: Tensor, grads: tuple[Tensor, ...]) -> Tensor:
        """Gradient of x, given that of `silu` in parts [T, W_i] that lie side by side."""

    def gate(self, x_TW: Tensor, u_TW: Tensor, epsilon: float, drop: Drop | None) -> Tensor:
        """drop(u * normalize(x))."""

    def gate_backward(
        self, x_TW: Tensor, u_TW: Tensor, grad_TW: Tensor, epsilon: float, drop: Drop | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x and u, given that of `gate`."""

    def drop(self, x_TW: Tensor, drop: Drop) -> Tensor:
        """X with elements dropped and the others scaled; also the backward of itself."""

    def integers(self, noise: TokenNoise, count: int, high: int) -> Tensor:
        """[T, count] int64 uniform in [0, high), as `TokenNoise.integers`."""


def normalize(x_TW: Tensor, epsilon: float) -> Tensor:
    """As in RowKernels."""
    return F.layer_norm(x_TW, (x_TW.shape[1],), eps=epsilon)


def normalize_backward(x_TW: Tensor, grad_TW: Tensor, epsilon: float) -> Tensor:
    """As in RowKernels."""
    width = (x_TW.shape[1],)
    _, mean, rate = torch.native_layer_norm(x_TW, width, None, None, epsilon)
    grad = torch.ops.aten.native_layer_norm_backward
    result: Tensor = grad(grad_TW.contiguous(), x_TW, width, mean, rate, None, None, [True, False, False])[0]
    return result


def silu(x_TW: Tensor) -> Tensor:
    """As in RowKernels."""
    return F.silu(x_TW)


def silu_backward(x_TW: Tensor, grads: tuple[Tensor, ...]) -> Tensor:
    """As in RowKernels."""
    result: Tensor = torch.ops.aten.silu_backward(torch.cat(grads, dim=1), x_TW)
    return result


def gate(x_TW: Tensor, u_TW: Tensor, epsilon: float, drop: Drop | None) -> Tensor:
    """As in RowKernels."""
    gated = u_TW * normalize(x_TW, epsilon)
    return gated if drop is None else _dropped(gated, drop)


def gate_backward(
    x_TW: Tensor, u_TW: Tensor, grad_TW: Tensor, epsilon: float, drop: Drop | None
) -> tuple[Tensor, Tensor]:
    """As in RowKernels."""
    if drop is not None:
        grad_TW = _dropped(grad_TW, drop)
    return normalize_backward(x_TW, grad_TW * u_TW, epsilon), grad_TW * normalize(x_TW, epsilon)


def _dropped(x_TW: Tensor, drop: Drop) -> Tensor:
    keep = drop.noise.words(x_TW.shape[1]) >= drop.threshold
    return x_TW * keep.to(x_TW.dtype).mul_(drop.scale)


def drop(x_TW: Tensor, drop: Drop) -> Tensor:
    """As in RowKernels."""
    return _dropped(x_TW, drop)


def integers(noise: TokenNoise, count: int, high: int) -> Tensor:
    """As in RowKernels."""
    return noise.integers(count, high)
