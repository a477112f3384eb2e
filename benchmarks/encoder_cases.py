"""What the encoder benchmark encodes: the paper's shape, and batches by a stated law of lengths; no torch.

`full`: every sequence has N tokens. `ragged`: mean N/4, spread as N·u^p for evenly spaced u in [0, 1], p chosen so that
the mean is met; the longest has N. `SL a`: sequences of N tokens under Stochastic Length with alpha = a, kept whole and
cut in the proportion of the law's probability. Rates count original sequences, whatever was left of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hstu_dist.data.config import StochasticLengthConfig
from hstu_dist.data.stochastic_length import StochasticLength
from hstu_dist.models.config import HSTUConfig, TransformerConfig
from hstu_dist.models.flops import Workload

WIDTH, HEADS, FFN_FACTOR = 512, 8, 4
"""D and H of the paper's figure, hence Q = 64; the Transformer's feed-forward width over D."""

LENGTHS = (1024, 2048, 4096, 8192)
ALPHAS = (1.5, 1.6, 1.7, 1.8, 1.9)
"""alpha = 2 cuts nothing: it is `full`."""

RAGGED_MEAN = 0.25
"""Mean length over N."""

_MIX_TOLERANCE = 0.02
"""How far the share of whole sequences in a batch may be from the law's, relatively."""


@dataclass(frozen=True)
class Batch:
    """Sequences that are encoded together.

    Attributes:
        name: law of the lengths.
        lengths: tokens of each sequence.
        longest: N, what padding pads to and the model is made for.
    """

    name: str
    lengths: tuple[int, ...]
    longest: int

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(self.lengths)

    @property
    def work(self) -> Workload:
        """Tokens and visible pairs."""
        return Workload.causal(self.lengths)


def full(longest: int, count: int) -> Batch:
    """Sequences of the greatest length."""
    return Batch("full", (longest,) * count, longest)


def ragged(longest: int, count: int) -> Batch:
    """Sequences of a quarter of the greatest length in mean, one of them with the greatest; ascending.

    Raises:
        ValueError: with so few sequences the longest alone exceeds the mean.
    """
    if count * RAGGED_MEAN <= 1:
        raise ValueError(f"count: got {count}, expected more than {1 / RAGGED_MEAN:g}")
    u = np.linspace(0, 1, count)
    low, high = 1.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((u**middle).mean()) > RAGGED_MEAN else (low, middle)
    lengths = np.maximum(1, np.rint(longest * u**high)).astype(int)
    return Batch("ragged", tuple(int(n) for n in lengths), longest)


def stochastic(longest: int, alpha: float) -> Batch:
    """The smallest batch of sequences of N tokens that Stochastic Length keeps whole in the law's proportion."""
    law = StochasticLength(StochasticLengthConfig(alpha=alpha, max_length=longest), longest, seed=0)
    probability = float(law.keep_probability(np.array([longest]))[0])
    count = next(c for c in range(1, 10_000) if _is_close(round(c * probability) / c, probability))
    whole = round(count * probability)
    return Batch(f"SL {alpha:g}", (longest,) * whole + (law.cut_length,) * (count - whole), longest)


def _is_close(share: float, probability: float) -> bool:
    return abs(share - probability) <= _MIX_TOLERANCE * probability


def hstu_config(longest: int, layers: int, *, bias: bool) -> HSTUConfig:
    """The paper's layer without dropout."""
    return HSTUConfig(
        width=WIDTH,
        num_heads=HEADS,
        num_layers=layers,
        dropout=0.0,
        max_length=longest,
        normalizer=float(longest),
        relative_bias="position_time" if bias else "none",
    )


def transformer_config(longest: int, layers: int) -> TransformerConfig:
    """A configuration with the FLOPs and parameters of the Transformer stack, for counting."""
    return TransformerConfig(
        width=WIDTH, num_heads=HEADS, num_layers=layers, max_length=longest, ffn_width=FFN_FACTOR * WIDTH
    )
