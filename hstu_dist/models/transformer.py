"""SASRec's Transformer block and the stack of them: the softmax baseline of HSTU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hstu_dist.models.config import TransformerConfig
from hstu_dist.models.context import Context, QueriesKeysValues
from hstu_dist.ops.random import TokenNoise
from hstu_dist.ops.row_kernels import RowKernels
from hstu_dist.ops.rows import drop_of, dropout
from hstu_dist.ops.spec import Activation, AttentionSpec, Backend

_EPSILON = 1e-8


class TransformerBlock(nn.Module):
    """Attention of normalised queries over unnormalised keys, then a ReLU feed-forward part.

    Dropout acts on the attention's output instead of its weights: a fused kernel has no weights to drop.
    """

    def __init__(self, config: TransformerConfig, backend: Backend, rows: RowKernels) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.dropout = config.dropout
        self.rows = rows
        D = config.width
        self.spec = AttentionSpec(
            normalizer=1.0, alpha=(D // self.heads) ** -0.5, activation=Activation.SOFTMAX, backend=backend
        )
        self.query_norm = nn.LayerNorm(D, eps=_EPSILON)
        self.query = nn.Linear(D, D)
        self.key_value = nn.Linear(D, 2 * D)
        self.output = nn.Linear(D, D)
        self.ffn_norm = nn.LayerNorm(D, eps=_EPSILON)
        self.ffn_in = nn.Linear(D, config.ffn_width)
        self.ffn_out = nn.Linear(config.ffn_width, D)
        for linear in (self.query, self.key_value, self.output, self.ffn_in, self.ffn_out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x_TD: Tensor, context: Context, layer: int) -> Tensor:
        """[T, D] → [T, D]; `layer` tells the random streams of the layers apart."""
        T, D = x_TD.shape
        heads = (T, self.heads, D // self.heads)
        noise = None if context.noise is None else context.noise.stream(layer)
        queries = self.query_norm(x_TD)
        k, v = self.key_value(x_TD).split(D, dim=1)
        qkv = QueriesKeysValues(self.query(queries).view(heads), k.view(heads), v.view(heads))
        attended = context.attend(layer, qkv, self.spec, None).reshape(T, D)
        x_TD = self.ffn_norm(queries + self._dropped(self.output(attended), noise, 0))
        hidden = self._dropped(F.relu(self.ffn_in(x_TD)), noise, 1)
        return x_TD + self._dropped(self.ffn_out(hidden), noise, 2)

    def _dropped(self, x: Tensor, noise: TokenNoise | None, use: int) -> Tensor:
        return dropout(x, drop_of(noise and noise.stream(use), self.dropout), self.rows)


class Transformer(nn.Module):
    """A stack of Transformer blocks."""

    def __init__(self, config: TransformerConfig, backend: Backend, rows: RowKernels) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerBlock(config, backend, rows) for _ in range(config.num_layers))

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        """[T, D] → [T, D]."""
        for index, layer in enumerate(self.layers):
            x_TD = layer(x_TD, context, index)
        return x_TD
