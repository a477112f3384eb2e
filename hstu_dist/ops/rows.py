"""The row-wise parts of an HSTU layer, each with a backward that recomputes what is cheap.

Shapes: T tokens, D model width, W columns. Saved for the backward per token: D + 4D elements by `project_silu` (x and
the pre-activations), nothing by `gate` and `dropout` beside their inputs, which the attention keeps anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hstu_dist.ops.random import Drop, TokenNoise
from hstu_dist.ops.row_kernels import RowKernels

EPSILON = 1e-6
"""Added to the variance by every normalisation of the layer, as in the public code."""


@dataclass(frozen=True)
class Projection:
    """A linear map whose output is split.

    Attributes:
        weight: [sum(widths), D].
        bias: [sum(widths)] or None.
        widths: columns of each output; at most four.
    """

    weight: Tensor
    bias: Tensor | None
    widths: tuple[int, ...]


def project_silu(x_TD: Tensor, projection: Projection, kernels: RowKernels) -> tuple[Tensor, ...]:
    """split(SiLU(norm(x) @ weightᵀ + bias)) (eq. 1).

    Args:
        x_TD: [T, D] floating.
        projection: the map.
        kernels: chosen by `backends.row_kernels`.

    Returns:
        One [T, W_i] for each width, strided views of one matrix.

    Raises:
        ValueError: the widths do not add up to the rows of the weight.
    """
    if sum(projection.widths) != projection.weight.shape[0] or not 1 <= len(projection.widths) <= 4:
        raise ValueError(
            f"widths: got {projection.widths}, expected one to four that add up to {projection.weight.shape[0]}"
        )
    parts: tuple[Tensor, ...] = _ProjectSilu.apply(  # type: ignore[no-untyped-call]
        x_TD, projection.weight, projection.bias, projection.widths, kernels
    )
    return parts


def gate(x_TW: Tensor, u_TW: Tensor, drop: Drop | None, kernels: RowKernels) -> Tensor:
    """dropout(u ⊙ norm(x)) (eq. 3, before the output projection).

    Args:
        x_TW: [T, W], what the attention gave.
        u_TW: [T, W], rows may be strided.
        drop: dropout of this step, or None.
        kernels: chosen by `backends.row_kernels`.
    """
    gated: Tensor = _Gate.apply(x_TW, u_TW, drop, kernels)  # type: ignore[no-untyped-call]
    return gated


def dropout(x_TW: Tensor, drop: Drop | None, kernels: RowKernels) -> Tensor:
    """Drops elements as `drop` says; None (evaluation) leaves x as it is."""
    if drop is None:
        return x_TW
    dropped: Tensor = _Dropout.apply(x_TW, drop, kernels)  # type: ignore[no-untyped-call]
    return dropped


def drop_of(noise: TokenNoise | None, rate: float) -> Drop | None:
    """Dropout at a rate with the step's random numbers; None where nothing is dropped."""
    return None if noise is None or rate == 0.0 else Drop(noise, rate)


class _ProjectSilu(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, widths: tuple[int, ...], kernels: RowKernels
    ) -> tuple[Tensor, ...]:
        before = F.linear(kernels.normalize(x, EPSILON), weight, bias)
        ctx.save_for_backward(x, before, weight)
        ctx.biased, ctx.kernels = bias is not None, kernels
        return torch.split(kernels.silu(before), list(widths), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, before, weight = ctx.saved_tensors
        kernels: RowKernels = ctx.kernels
        grad_before = kernels.silu_backward(before, grads)
        grad_x = kernels.normalize_backward(x, grad_before @ weight, EPSILON)
        grad_weight = grad_before.T @ kernels.normalize(x, EPSILON)
        return grad_x, grad_weight, grad_before.sum(0) if ctx.biased else None, None, None


class _Gate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, drop: Drop | None, kernels: RowKernels) -> Tensor:
        ctx.save_for_backward(x, u)
        ctx.drop, ctx.kernels = drop, kernels
        return kernels.gate(x, u, EPSILON, drop)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, u = ctx.saved_tensors
        return (*ctx.kernels.gate_backward(x, u, grad, EPSILON, ctx.drop), None, None)


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: Drop, kernels: RowKernels) -> Tensor:
        ctx.drop, ctx.kernels = drop, kernels
        return kernels.drop(x, drop)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.kernels.drop(grad, ctx.drop), None, None
