"""The row-wise parts of an HSTU layer, each with a backward that recomputes what is cheap.

Shapes: T tokens, D model width, W columns. Saved for the backward per token: D + 4D elements by `project_silu` (x and
the pre-activations), nothing by `gated_output` and `dropout` beside what the attention keeps anyway.
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
    """A linear map.

    Attributes:
        weight: [outputs, inputs].
        bias: [outputs] or None.
    """

    weight: Tensor
    bias: Tensor | None


def project_silu(
    x_TD: Tensor, projection: Projection, widths: tuple[int, ...], kernels: RowKernels
) -> tuple[Tensor, ...]:
    """split(SiLU(norm(x) @ weightᵀ + bias)) (eq. 1).

    Args:
        x_TD: [T, D] floating.
        projection: the map, to sum(widths) outputs.
        widths: columns of each result; at most four.
        kernels: chosen by `backends.row_kernels`.

    Returns:
        One [T, W_i] for each width, strided views of one matrix.

    Raises:
        ValueError: the widths do not add up to the rows of the weight.
    """
    if sum(widths) != projection.weight.shape[0] or not 1 <= len(widths) <= 4:
        raise ValueError(f"widths: got {widths}, expected one to four that add up to {projection.weight.shape[0]}")
    parts: tuple[Tensor, ...] = _ProjectSilu.apply(  # type: ignore[no-untyped-call]
        x_TD, projection.weight, projection.bias, widths, kernels
    )
    return parts


def gated_output(
    x_TD: Tensor, attended_TW: Tensor, u_TW: Tensor, output: Projection, drop: Drop | None, kernels: RowKernels
) -> Tensor:
    """X + dropout(u ⊙ norm(attended)) @ weightᵀ + bias (eq. 3).

    Args:
        x_TD: [T, D], the layer's input.
        attended_TW: [T, W], what the attention gave.
        u_TW: [T, W], rows may be strided.
        output: weight [D, W] and bias [D].
        drop: dropout of this step, or None.
        kernels: chosen by `backends.row_kernels`.
    """
    operands = (x_TD, attended_TW, u_TW, output.weight, output.bias)
    out: Tensor = _GatedOutput.apply(drop, kernels, *operands)  # type: ignore[no-untyped-call]
    return out


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


class _GatedOutput(Function):
    @staticmethod
    def forward(ctx: Any, drop: Drop | None, kernels: RowKernels, *operands: Tensor) -> Tensor:
        x, attended, u, weight, bias = operands
        ctx.save_for_backward(attended, u, weight)
        ctx.biased, ctx.drop, ctx.kernels = bias is not None, drop, kernels
        return F.linear(kernels.gate(attended, u, EPSILON, drop), weight, bias).add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        attended, u, weight = ctx.saved_tensors
        kernels: RowKernels = ctx.kernels
        # the gate is recomputed: cheap, and one matrix per layer less to keep
        grad_weight = grad.T @ kernels.gate(attended, u, EPSILON, ctx.drop)
        grad_attended, grad_u = kernels.gate_backward(attended, u, grad @ weight, EPSILON, ctx.drop)
        grad_bias = grad.sum(0) if ctx.biased else None
        return None, None, grad, grad_attended, grad_u, grad_weight, grad_bias


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: Drop, kernels: RowKernels) -> Tensor:
        ctx.drop, ctx.kernels = drop, kernels
        return kernels.drop(x, drop)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.kernels.drop(grad, ctx.drop), None, None
