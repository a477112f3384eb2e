"""The paper's layer as one differentiable operation that keeps six widths a token for its backward.

    x + dropout(u ⊙ norm(attention(q, k, v))) @ outputᵀ,   [u | v | q | k] = SiLU(norm(x) @ projectionᵀ)

Kept are x (D), what SiLU saw (4D) and what the attention gave (D); u, v, q and k are made again from the second, which
costs one element-wise pass. The paper counts 14 bytes a width in bfloat16, which is seven (section 3.3.2).
Shapes: T tokens, D model width, H heads, Q query/key head width, V value head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hstu_dist.ops.attention import operator_arguments
from hstu_dist.ops.bias import RelativeBias
from hstu_dist.ops.random import Drop
from hstu_dist.ops.row_kernels import RowKernels
from hstu_dist.ops.rows import EPSILON, Projection
from hstu_dist.ops.spec import AttentionSpec, JaggedLayout


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """What a block computes, besides its weights.

    Attributes:
        heads: H.
        qk_width: Q.
        value_width: V.
        attention: of the attention; any backend but the reference, which has no backward of its own.
        kernels: of the row-wise parts.
    """

    heads: int
    qk_width: int
    value_width: int
    attention: AttentionSpec
    kernels: RowKernels

    def parts(self, before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The parts u [T, H·V], v [T, H, V], q and k [T, H, Q], strided views of SiLU(before)."""
        T, H, Q, V = before.shape[0], self.heads, self.qk_width, self.value_width
        u, v, q, k = torch.split(self.kernels.silu(before), [H * V, H * V, H * Q, H * Q], dim=1)
        return u, v.view(T, H, V), q.view(T, H, Q), k.view(T, H, Q)


@dataclass(frozen=True, kw_only=True)
class BlockBatch:
    """What a block needs to know of the batch.

    Attributes:
        layout: the sequences.
        bias: relative bias, or None. Gradients reach its weights.
        drop: dropout of this step, or None.
    """

    layout: JaggedLayout
    bias: RelativeBias | None
    drop: Drop | None


def hstu_block(x_TD: Tensor, projection: Projection, output: Projection, spec: BlockSpec, batch: BlockBatch) -> Tensor:
    """One HSTU layer (eq. 1-3).

    Args:
        x_TD: [T, D] floating.
        projection: to 2·H·V + 2·H·Q columns: u, v, q, k.
        output: from H·V columns to D.
        spec: what to compute.
        batch: over which sequences.

    Returns:
        [T, D].

    Raises:
        ValueError: a shape, dtype, device or length that does not fit.
    """
    weights = (projection.weight, projection.bias, output.weight, output.bias)
    tables = (None, None) if batch.bias is None else (batch.bias.position_weight, batch.bias.time_weight)
    out: Tensor = _HSTUBlock.apply(spec, batch, x_TD, *weights, *tables)  # type: ignore[no-untyped-call]
    return out


class _HSTUBlock(Function):
    @staticmethod
    def forward(ctx: Any, spec: BlockSpec, batch: BlockBatch, *operands: Tensor) -> Tensor:
        x, weight, bias, out_weight, out_bias, _, _ = operands
        kernels = spec.kernels
        before = F.linear(kernels.normalize(x, EPSILON), weight, bias)
        u, v, q, k = spec.parts(before)
        arguments = operator_arguments(q, k, v, batch.layout, spec.attention, batch.bias)
        attended, lse = torch.ops.hstu_dist.attention(*arguments)
        ctx.save_for_backward(x, before, attended, lse, weight, out_weight, *arguments[3:11])
        ctx.spec, ctx.drop, ctx.scalars = spec, batch.drop, arguments[11:]
        ctx.biased = bias is not None, out_bias is not None
        gated = kernels.gate(attended.flatten(1), u, EPSILON, batch.drop)
        return F.linear(gated, out_weight, out_bias).add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, before, attended, lse, weight, out_weight, *layout = ctx.saved_tensors
        spec: BlockSpec = ctx.spec
        kernels = spec.kernels
        u, v, q, k = spec.parts(before)
        attended_TW = attended.flatten(1)
        grad_out_weight = grad.T @ kernels.gate(attended_TW, u, EPSILON, ctx.drop)
        grad_attended, grad_u = kernels.gate_backward(attended_TW, u, grad @ out_weight, EPSILON, ctx.drop)
        grad_q, grad_k, grad_v, grad_position, grad_time = torch.ops.hstu_dist.attention_backward(
            attended, lse, grad_attended.view_as(attended), q, k, v, *layout, *ctx.scalars
        )
        grads = (grad_u, grad_v.flatten(1), grad_q.flatten(1), grad_k.flatten(1))
        grad_before = kernels.silu_backward(before, grads)
        grad_weight = grad_before.T @ kernels.normalize(x, EPSILON)
        grad_x = kernels.normalize_backward(x, grad_before @ weight, EPSILON).add_(grad)
        # an operator returns tensors only: that of an absent table is empty
        tables = [
            None if table is None else g for table, g in zip(layout[4:6], (grad_position, grad_time), strict=True)
        ]
        biases = [g.sum(0) if has else None for has, g in zip(ctx.biased, (grad_before, grad), strict=True)]
        return None, None, grad_x, grad_weight, biases[0], grad_out_weight, biases[1], *tables
