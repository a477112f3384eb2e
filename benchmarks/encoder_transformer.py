"""The baseline: a pre-norm Transformer decoder as one would write it today, attention by a fused causal kernel.

One projection for queries, keys and values, no biases, GELU, four times wider inside, no dropout. Learned positions are
added before the first block, as they are for HSTU, and cost nothing here; rotary ones turn queries and keys in each.
Shapes: B sequences of N tokens or T tokens of a jagged batch as leading sizes, D width, H heads, W head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.encoder_cases import FFN_FACTOR, HEADS, WIDTH

_ROTARY_BASE = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the blocks of one batch share.

    Attributes:
        attend: q, k, v [..., H, W] → the same shape, causal within each sequence.
        rotation: cosines and sines [..., 1, W/2] of the positions, or None for learned positions.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    rotation: tuple[Tensor, Tensor] | None = None


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.ffn_norm = nn.LayerNorm(WIDTH)
        self.ffn_in = nn.Linear(WIDTH, FFN_FACTOR * WIDTH, bias=False)
        self.ffn_out = nn.Linear(FFN_FACTOR * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[..., D] → [..., D]."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        if layout.rotation is not None:
            q, k = (rotated(each, layout.rotation) for each in (q, k))
        x = x + self.output(layout.attend(q, k, v).flatten(-2))
        y: Tensor = x + self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(x))))
        return y


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[..., D] → [..., D]."""
        for layer in self.layers:
            x = layer(x, layout)
        return x


def rotation(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions.

    Args:
        positions: [...] int64, of each token in its sequence.
        dtype: of the result.

    Returns:
        Two tensors [..., 1, W/2].
    """
    half = WIDTH // HEADS // 2
    frequencies = _ROTARY_BASE ** -(torch.arange(half, device=positions.device, dtype=torch.float64) / half)
    angles = positions[..., None, None].double() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """[..., H, W] → [..., H, W]: the two halves of a head turned by its position's angles."""
    a, b = x.chunk(2, dim=-1)
    cosine, sine = by
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], dim=-1)
