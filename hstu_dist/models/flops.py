"""Closed-form FLOPs and parameter counts of a model configuration; importable without torch.

A multiply-add counts 2. Counted are the matrix products that the mathematics needs: projections, attention over
visible pairs, scores of the loss. Not counted, as is custom for MFU: element-wise work (activations, gates, dropout,
masks, softmax), norms, look-ups of items, positions and relative bias, optimizer updates, and whatever an
implementation computes beyond the need (hidden pairs of a tile, scores nobody asked for, recomputation).

Letters: T tokens, P visible (query, key) pairs, C scores per token, D width, L layers, H heads, Q and V head widths of
query/key and value, F feed-forward width, N longest sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from hstu_dist.models.config import EncoderConfig, HSTUConfig, PluginEncoderConfig, TransformerConfig
from hstu_dist.models.plugin import encoder_class

_TIME_BUCKETS = 129
"""Entries of the time bias; `ops.bias` has the original, beside code that needs torch."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the FLOPs of a batch depend on, besides the model; the sum of two is that of both batches.

    Attributes:
        tokens: T.
        attention_pairs: P, (query, key) pairs that attention computes, over all sequences; one head of one layer.
        context: tokens whose targets the loss leaves out.
    """

    tokens: int = 0
    attention_pairs: int = 0
    context: int = 0
    skipped_tokens: int = 0
    skipped_pairs: int = 0

    def __add__(self, other: Workload) -> Workload:
        return Workload(
            tokens=self.tokens + other.tokens,
            attention_pairs=self.attention_pairs + other.attention_pairs,
            context=self.context + other.context,
            skipped_tokens=self.skipped_tokens + other.skipped_tokens,
            skipped_pairs=self.skipped_pairs + other.skipped_pairs,
        )

    @property
    def targets(self) -> int:
        """Positions that count in the loss."""
        return self.tokens - self.context

    @classmethod
    def causal(cls, lengths: Iterable[int]) -> Workload:
        """Sequences whose tokens see themselves and what came before: n(n+1)/2 pairs each."""
        sizes = list(lengths)
        return cls(tokens=sum(sizes), attention_pairs=sum(n * (n + 1) // 2 for n in sizes))

    @classmethod
    def full(cls, lengths: Iterable[int]) -> Workload:
        """As an implementation computes them that masks afterwards: n² pairs each.

        A padded batch is one whose lengths are all the longest.
        """
        sizes = list(lengths)
        return cls(tokens=sum(sizes), attention_pairs=sum(n * n for n in sizes))


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """FLOPs of one forward pass by part.

    The backward of a product is two products of its size, one for each factor: it costs twice the forward, part
    by part, and a training step three times.

    Attributes:
        projections: 2·T·(weights of the dense layers of all blocks).
        attention: 2·P·L·H·(Q + V), for q kᵀ and A v.
        scores: 2·T·C·D, for the similarities that the loss compares; context has none.
    """

    projections: int
    attention: int
    scores: int

    @property
    def forward(self) -> int:
        """All parts."""
        return self.projections + self.attention + self.scores

    @property
    def backward(self) -> int:
        """All parts, 2 x forward."""
        return 2 * self.forward

    @property
    def training(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Trained numbers by part.

    Attributes:
        positions: N·D, and 129·D of a time encoding at the input.
        projections: weights and biases of the dense layers of all blocks.
        norms: scales and shifts of the layer norms that learn them.
        relative_bias: (2N - 1) a layer for positions, 129 for times.
        table: (rows of the item table)·D; stored rows may be padded, the padding is no parameter.
        features: (rows of the small embeddings of a ranking model)·D.
    """

    positions: int
    projections: int
    norms: int
    relative_bias: int
    table: int
    features: int = 0

    @property
    def dense(self) -> int:
        """The tower: everything but the table."""
        return self.positions + self.projections + self.norms + self.relative_bias + self.features

    @property
    def total(self) -> int:
        """Tower and table."""
        return self.dense + self.table


def count_flops(config: EncoderConfig, work: Workload, scores_per_token: int) -> FlopCount:
    """FLOPs of a forward pass over a batch.

    Args:
        config: the model.
        work: the batch.
        scores_per_token: C: R + 1 for R sampled negatives, all items for the full softmax, 0 for the tower alone.
    """
    if isinstance(config, PluginEncoderConfig):
        scores = 2 * work.targets * scores_per_token * config.width
        return FlopCount(projections=encoder_class(config).flops(config, work), attention=0, scores=scores)
    weights = sum(dense.inputs * dense.outputs for dense in _dense_layers(config))
    heads = config.num_heads * sum(head_widths(config))
    top = config.truncated_layers if isinstance(config, HSTUConfig) else 0
    return FlopCount(
        projections=2 * (config.num_layers * work.tokens - top * work.skipped_tokens) * weights,
        attention=2 * (config.num_layers * work.attention_pairs - top * work.skipped_pairs) * heads,
        scores=2 * work.targets * scores_per_token * config.width,
    )


def encoder_work(config: EncoderConfig, lengths: Iterable[int], num_contextual: int = 0) -> Workload:
    """Work of sequences of so many tokens, with the window and the truncated layers of a configuration.

    Args:
        config: the model.
        lengths: tokens of each sequence, contextual ones included.
        num_contextual: leading tokens of each that see each other, and that all see.
    """
    sizes = list(lengths)
    tokens, pairs = sum(sizes), sum(visible_pairs(config, n, num_contextual) for n in sizes)
    if not isinstance(config, HSTUConfig) or not config.truncated_layers:
        return Workload(tokens=tokens, attention_pairs=pairs)
    kept = [min(n, config.truncated_length) for n in sizes]
    left = [max(0, num_contextual - (n - k)) for n, k in zip(sizes, kept, strict=True)]
    seen = sum(visible_pairs(config, k, c) for k, c in zip(kept, left, strict=True))
    return Workload(tokens=tokens, attention_pairs=pairs, skipped_tokens=tokens - sum(kept), skipped_pairs=pairs - seen)


def visible_pairs(config: EncoderConfig, length: int, num_contextual: int = 0) -> int:
    """(query, key) pairs that the mask of `ops.mask` lets through in a sequence; one head of one layer."""
    C = min(num_contextual, length)
    if not isinstance(config, HSTUConfig) or not config.window:
        window, always = length, 0
    else:
        window, always = config.window, max(config.global_prefix, C)
    return C * C + _pairs_below(length, window, always) - _pairs_below(C, window, always)


def _pairs_below(length: int, window: int, always: int) -> int:
    """Sum over positions below `length` of min(p + 1, window) + min(always, keys before the window)."""
    inside, outside = min(length, window), max(0, length - window)
    short = min(outside, always)
    return inside * (inside + 1) // 2 + outside * window + short * (short + 1) // 2 + (outside - short) * always


def count_parameters(config: HSTUConfig | TransformerConfig, num_items: int) -> ParameterCount:
    """Parameters of the tower and of an item table of `num_items` rows."""
    dense = _dense_layers(config)
    block = sum(layer.inputs * layer.outputs + layer.bias * layer.outputs for layer in dense)
    return ParameterCount(
        positions=(config.max_length + (_TIME_BUCKETS if _timed_input(config) else 0)) * config.width,
        projections=config.num_layers * block,
        norms=config.num_layers * _norm_parameters(config),
        relative_bias=config.num_layers * _bias_parameters(config),
        table=num_items * config.width,
    )


def _timed_input(config: EncoderConfig) -> bool:
    return isinstance(config, HSTUConfig) and config.input_time


class _DenseLayer(NamedTuple):
    inputs: int
    outputs: int
    bias: bool


def _dense_layers(config: HSTUConfig | TransformerConfig) -> list[_DenseLayer]:
    """Dense layers of one block."""
    D, H = config.width, config.num_heads
    if isinstance(config, TransformerConfig):
        F = config.ffn_width
        shapes = [(D, D), (D, 2 * D), (D, D), (D, F), (F, D)]
        return [_DenseLayer(inputs, outputs, bias=True) for inputs, outputs in shapes]
    Q, V = head_widths(config)
    gated = 2 * H * V + D if config.concat_ux else H * V
    return [_DenseLayer(D, 2 * H * (V + Q), bias=config.uvqk_bias), _DenseLayer(gated, D, bias=True)]


def head_widths(config: HSTUConfig | TransformerConfig) -> tuple[int, int]:
    """Q and V."""
    even = config.width // config.num_heads
    if isinstance(config, TransformerConfig):
        return even, even
    return config.qk_width or even, config.value_width or even


def _norm_parameters(config: HSTUConfig | TransformerConfig) -> int:
    """Scales and shifts of the two norms of one block."""
    if isinstance(config, TransformerConfig):
        return 2 * (config.width + config.width)
    _, V = head_widths(config)
    return 2 * (config.width + config.num_heads * V) if config.affine_norm else 0


def _bias_parameters(config: HSTUConfig | TransformerConfig) -> int:
    """Relative bias of one block."""
    if isinstance(config, TransformerConfig) or config.relative_bias == "none":
        return 0
    return 2 * config.max_length - 1 + (_TIME_BUCKETS if config.relative_bias == "position_time" else 0)
