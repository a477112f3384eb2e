"""The HSTU layer (eq. 1-3) and the stack of them.

Shapes: T tokens, D model width, H heads, Q query/key head width, V value head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hstu_dist.models.config import HSTUConfig
from hstu_dist.models.context import Context, QueriesKeysValues, SequenceContext
from hstu_dist.ops.bias import NUM_TIME_BUCKETS, RelativeBias
from hstu_dist.ops.block import BlockBatch, BlockSpec, hstu_block
from hstu_dist.ops.random import Drop
from hstu_dist.ops.row_kernels import RowKernels
from hstu_dist.ops.rows import EPSILON, Projection, drop_of, dropout, gated_output, project_silu
from hstu_dist.ops.spec import Activation, AttentionSpec, Backend

_INIT_STD = 0.02


class HSTULayer(nn.Module):
    """One block: project, attend pointwise, gate, project back, add."""

    def __init__(self, config: HSTUConfig, backend: Backend, rows: RowKernels) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qk_width = config.qk_width or config.width // config.num_heads
        self.value_width = config.value_width or config.width // config.num_heads
        self.concat_ux = config.concat_ux
        self.rows = rows
        self.dropout = config.dropout
        self.spec = AttentionSpec(
            normalizer=config.normalizer,
            alpha=config.alpha,
            activation=Activation(config.activation),
            window=config.window,
            global_prefix=config.global_prefix,
            backend=backend,
        )
        D, HV, HQ = config.width, self.heads * self.value_width, self.heads * self.qk_width
        affine = config.affine_norm
        # without learned scale and shift a norm is part of the row kernels
        self.input_norm = nn.LayerNorm(D, eps=EPSILON) if affine else None
        self.uvqk = nn.Linear(D, 2 * HV + 2 * HQ, bias=config.uvqk_bias)
        self.output_norm = nn.LayerNorm(HV, eps=EPSILON, elementwise_affine=affine)
        self.fused_output = not affine and not config.concat_ux
        # the reference is differentiated by autograd, operation by operation
        self.fused = self.fused_output and backend is not Backend.REFERENCE
        self.output = nn.Linear(2 * HV + D if config.concat_ux else HV, D)
        positioned = config.relative_bias != "none"
        timed = config.relative_bias == "position_time"
        self.position_weight = nn.Parameter(torch.empty(2 * config.max_length - 1)) if positioned else None
        self.time_weight = nn.Parameter(torch.empty(NUM_TIME_BUCKETS)) if timed else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projection and bias tables N(0, 0.02), output Xavier uniform, as in the public code."""
        nn.init.normal_(self.uvqk.weight, std=_INIT_STD)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        for optional in (self.position_weight, self.time_weight):
            if optional is not None:
                nn.init.normal_(optional, std=_INIT_STD)
        if self.uvqk.bias is not None:
            nn.init.zeros_(self.uvqk.bias)

    def forward(self, x_TD: Tensor, context: Context, layer: int) -> Tensor:
        """[T, D] → [T, D]; `layer` tells the random streams of the layers apart."""
        noise = None if context.noise is None else context.noise.stream(layer)
        drop = drop_of(noise, self.dropout)
        # one operation where something is kept for a backward, and all keys and values are of this batch
        if self.fused and torch.is_grad_enabled() and isinstance(context, SequenceContext) and context.memory is None:
            return self._block(x_TD, context, drop)
        T, H = x_TD.shape[0], self.heads
        HV, HQ = H * self.value_width, H * self.qk_width
        u, v, q, k = project_silu(x_TD, self._projection(), (HV, HV, HQ, HQ), self.rows)
        qkv = QueriesKeysValues(
            q.view(T, H, self.qk_width), k.view(T, H, self.qk_width), v.view(T, H, self.value_width)
        )
        attended_THV = context.attend(layer, qkv, self.spec, self._bias(context))
        return self._output(x_TD, attended_THV.flatten(1), u, drop)

    def _block(self, x_TD: Tensor, context: SequenceContext, drop: Drop | None) -> Tensor:
        spec = BlockSpec(
            heads=self.heads,
            qk_width=self.qk_width,
            value_width=self.value_width,
            attention=self.spec,
            kernels=self.rows,
        )
        batch = BlockBatch(layout=context.layout, bias=self._bias(context), drop=drop)
        return hstu_block(x_TD, self._projection(), Projection(self.output.weight, self.output.bias), spec, batch)

    def _projection(self) -> Projection:
        """Of the normalised input; a learned scale and shift of the norm is part of the linear map."""
        weight, bias, norm = self.uvqk.weight, self.uvqk.bias, self.input_norm
        if norm is None:
            return Projection(weight, bias)
        shift = weight @ norm.bias
        return Projection(weight * norm.weight, shift if bias is None else bias + shift)

    def _output(self, x_TD: Tensor, attended: Tensor, u: Tensor, drop: Drop | None) -> Tensor:
        if self.fused_output:
            output = Projection(self.output.weight, self.output.bias)
            return gated_output(x_TD, attended, u, output, drop, self.rows)
        gated = u * self.output_norm(attended)
        if self.concat_ux:
            gated = torch.cat([u, x_TD, gated], dim=1)
        projected: Tensor = self.output(dropout(gated, drop, self.rows))
        return x_TD + projected

    def _bias(self, context: Context) -> RelativeBias | None:
        if self.position_weight is None:
            return None
        if self.time_weight is None:
            return RelativeBias(position_weight=self.position_weight)
        return RelativeBias(
            position_weight=self.position_weight,
            time_weight=self.time_weight,
            query_times=context.query_times,
            key_times=context.key_times,
        )


class HSTU(nn.Module):
    """A stack of HSTU layers; the upper ones may run on the most recent tokens only."""

    def __init__(self, config: HSTUConfig, backend: Backend, rows: RowKernels) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HSTULayer(config, backend, rows) for _ in range(config.num_layers))
        self.whole_layers = config.num_layers - config.truncated_layers
        self.truncated_length = config.truncated_length

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        """[T, D] → [T, D]; tokens that skip the truncated layers come out as the layers below left them."""
        whole, truncated = self.layers[: self.whole_layers], self.layers[self.whole_layers :]
        for index, layer in enumerate(whole):
            x_TD = layer(x_TD, context, index)
        if not truncated:
            return x_TD
        rows, recent = context.recent(self.truncated_length)
        top_RD = x_TD.index_select(0, rows)
        for index, layer in enumerate(truncated, start=self.whole_layers):
            top_RD = layer(top_RD, recent, index)
        return x_TD.index_copy(0, rows, top_RD)
