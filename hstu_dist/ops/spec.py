"""What an attention call means: mask, scaling and layout, checked before any memory is touched."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from hstu_dist.ops.bias import NUM_TIME_BUCKETS, RelativeBias


class Activation(StrEnum):
    """Pointwise nonlinearity of the scores: HSTU's SiLU, or softmax for baselines and ablation."""

    SILU = "silu"
    SOFTMAX = "softmax"


class Backend(StrEnum):
    """Implementations of `hstu_attention`; all compute the same function and gradients."""

    REFERENCE = "reference"
    BLOCKED = "blocked"
    NATIVE = "native"
    TRITON = "triton"


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Everything about an attention call that is not a tensor.

    Attributes:
        normalizer: n of eq. 2: SiLU scores are divided by this constant. Softmax ignores it.
        alpha: scale of q k^T before the bias is added; the paper's layer uses 1.
        activation: SiLU or softmax.
        window: a query sees its `window` most recent keys, itself included; 0 means no limit.
        global_prefix: the first `global_prefix` keys stay visible outside the window
            (semi-local attention, arXiv 2602.16986). Without a window it changes nothing.
        backend: which implementation computes it.
    """

    normalizer: float
    alpha: float = 1.0
    activation: Activation = Activation.SILU
    window: int = 0
    global_prefix: int = 0
    backend: Backend = Backend.BLOCKED

    def __post_init__(self) -> None:
        if not self.normalizer > 0:
            raise ValueError(f"AttentionSpec.normalizer: got {self.normalizer}, expected a number > 0")
        if self.window < 0 or self.global_prefix < 0:
            raise ValueError(
                f"AttentionSpec: got window {self.window} and global_prefix {self.global_prefix}, expected >= 0"
            )


@dataclass(frozen=True)
class JaggedLayout:
    """Where the sequences of a jagged batch lie, and which of their tokens are special.

    Built once a batch and used by every layer: building it checks the values, which costs one
    device synchronisation, so that the layers do not pay for it.

    Positions count the keys of a sequence from 0. With n keys, m <= n queries are the LAST m of those
    positions (m < n: the first n - m keys come from a cache). Per sequence:

    - the first `num_contextual` positions see exactly each other; every later token sees them, also
      outside the window;
    - the last `num_targets` positions are candidates: each sees the history and itself, and all of them
      share one position index, n - num_targets, in bias and window;
    - every other position sees itself and what came before.

    Attributes:
        offsets: [B+1] int64, of the queries; q has offsets[B] rows.
        key_offsets: [B+1] int64, of keys and values; None: the same as `offsets`.
        num_contextual: [B] int64, or None for 0.
        num_targets: [B] int64, or None for 0.
        total: number of query rows T.
        key_total: number of key rows.
        max_length: the longest query sequence (0 for an empty batch).
        max_key_length: the longest key sequence.
        num_positions: the most positions of a sequence, its targets counted as one.

    Raises:
        ValueError: names the field, what was got and what was expected.
    """

    offsets: Tensor
    key_offsets: Tensor | None = None
    num_contextual: Tensor | None = None
    num_targets: Tensor | None = None
    total: int = field(init=False)
    key_total: int = field(init=False)
    max_length: int = field(init=False)
    max_key_length: int = field(init=False)
    num_positions: int = field(init=False)

    def __post_init__(self) -> None:
        lengths = _checked_lengths("offsets", self.offsets)
        key_lengths = lengths
        if self.key_offsets is not None:
            key_lengths = _checked_lengths("key_offsets", self.key_offsets)
            if key_lengths.numel() != lengths.numel():
                raise ValueError(
                    f"key_offsets: got {key_lengths.numel()} sequences, expected {lengths.numel()} as in offsets"
                )
            if self.key_offsets.device != self.offsets.device:
                raise ValueError(f"key_offsets: got {_where(self.key_offsets)}, expected {self.offsets.device}")
            _reject("offsets", lengths > key_lengths, "more queries than keys", "queries to be the last of their keys")
        special = torch.zeros_like(key_lengths)
        for name in ("num_contextual", "num_targets"):
            special = special + self._checked_counts(name, key_lengths)
        _reject("num_contextual + num_targets", special > key_lengths, "more than the keys", "at most the sequence")
        object.__setattr__(self, "total", int(lengths.sum()))
        object.__setattr__(self, "key_total", int(key_lengths.sum()))
        object.__setattr__(self, "max_length", int(lengths.max()) if lengths.numel() else 0)
        object.__setattr__(self, "max_key_length", int(key_lengths.max()) if key_lengths.numel() else 0)
        targets = torch.zeros_like(key_lengths) if self.num_targets is None else self.num_targets.cpu()
        positions = key_lengths - (targets - 1).clamp(min=0)
        object.__setattr__(self, "num_positions", int(positions.max()) if positions.numel() else 0)

    def _checked_counts(self, name: str, key_lengths: Tensor) -> Tensor:
        counts: Tensor | None = getattr(self, name)
        if counts is None:
            return torch.zeros_like(key_lengths)
        if counts.dtype != torch.int64 or counts.shape != key_lengths.shape:
            raise ValueError(
                f"{name}: got {counts.dtype} of shape {tuple(counts.shape)}, "
                f"expected torch.int64 of shape {tuple(key_lengths.shape)}"
            )
        if counts.device != self.offsets.device or not counts.is_contiguous():
            raise ValueError(f"{name}: got {_where(counts)}, expected contiguous on {self.offsets.device}")
        counts = counts.cpu()
        _reject(name, counts < 0, "a negative count", ">= 0")
        _reject(name, counts > key_lengths, "more than the keys", "at most the sequence")
        return counts


def _where(x: Tensor) -> str:
    return f"{'contiguous' if x.is_contiguous() else 'non-contiguous'} on {x.device}"


def _checked_lengths(name: str, offsets: Tensor) -> Tensor:
    """Lengths [B] on the CPU of valid offsets [B+1]."""
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.numel() < 1:
        raise ValueError(
            f"{name}: got {offsets.dtype} of shape {tuple(offsets.shape)}, expected torch.int64 of shape [B+1]"
        )
    if not offsets.is_contiguous():
        raise ValueError(f"{name}: got a non-contiguous tensor, expected contiguous")
    host = offsets.cpu()
    if int(host[0]) != 0:
        raise ValueError(f"{name}: got a first offset of {int(host[0])}, expected 0")
    lengths = host.diff()
    _reject(name, lengths < 0, "decreasing offsets", "offsets that never decrease")
    return lengths


def _reject(name: str, bad: Tensor, got: str, expected: str) -> None:
    if bool(bad.any()):
        where = int(bad.nonzero()[0])
        raise ValueError(f"{name}: got {got} at sequence {where}, expected {expected}")


def check_call(q: Tensor, k: Tensor, v: Tensor, layout: JaggedLayout, bias: RelativeBias | None) -> None:
    """Shapes, dtypes, devices and strides of a call against its layout.

    Raises:
        ValueError: names the argument, what was got and what was expected.
    """
    for name, x, rows in (("q", q, layout.total), ("k", k, layout.key_total), ("v", v, layout.key_total)):
        if x.dim() != 3 or x.shape[0] != rows:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected [{rows}, heads, width] for these offsets")
        if x.dtype != q.dtype or not x.is_floating_point():
            raise ValueError(f"{name}: got {x.dtype}, expected the floating dtype of q ({q.dtype})")
        if x.device != layout.offsets.device:
            raise ValueError(f"{name}: got a tensor on {x.device}, expected {layout.offsets.device} as the offsets")
        if x.numel() and (x.stride(2) != 1 or x.stride(1) != x.shape[2]):
            raise ValueError(f"{name}: got strides {x.stride()}, expected heads and width contiguous within a row")
    if q.shape[1] != k.shape[1] or q.shape[1] != v.shape[1]:
        raise ValueError(f"heads: got q {q.shape[1]}, k {k.shape[1]}, v {v.shape[1]}, expected the same number")
    if q.shape[1] == 0 or q.shape[2] == 0 or v.shape[2] == 0:
        raise ValueError(f"q, v: got shapes {tuple(q.shape)}, {tuple(v.shape)}, expected at least one head of width 1")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"k: got head width {k.shape[2]}, expected {q.shape[2]} as in q")
    if bias is not None:
        _check_bias(bias, q, layout)


def _check_bias(bias: RelativeBias, q: Tensor, layout: JaggedLayout) -> None:
    weight = bias.position_weight
    if weight.dim() != 1 or weight.numel() % 2 == 0:
        raise ValueError(f"position_weight: got shape {tuple(weight.shape)}, expected [2N-1]")
    if layout.num_positions > bias.max_length:
        raise ValueError(
            f"offsets: got a sequence of length {layout.num_positions}, "
            f"expected at most N = {bias.max_length}, the length that position_weight serves"
        )
    weights = [("position_weight", weight)]
    times = (bias.time_weight, bias.query_times, bias.key_times)
    if any(t is not None for t in times):
        if bias.time_weight is None or bias.query_times is None or bias.key_times is None:
            raise ValueError("time_weight, query_times, key_times: got only some of them, expected all three or none")
        if bias.time_weight.shape != (NUM_TIME_BUCKETS,):
            raise ValueError(f"time_weight: got shape {tuple(bias.time_weight.shape)}, expected [{NUM_TIME_BUCKETS}]")
        weights.append(("time_weight", bias.time_weight))
        for name, x, rows in (
            ("query_times", bias.query_times, layout.total),
            ("key_times", bias.key_times, layout.key_total),
        ):
            if x.shape != (rows,) or x.dtype != torch.int64 or x.device != q.device or not x.is_contiguous():
                raise ValueError(
                    f"{name}: got {x.dtype} of shape {tuple(x.shape)}, {_where(x)}, "
                    f"expected torch.int64 of shape [{rows}], contiguous on {q.device}"
                )
    for name, x in weights:
        if not x.is_floating_point() or x.device != q.device or not x.is_contiguous():
            raise ValueError(f"{name}: got {x.dtype}, {_where(x)}, expected floating, contiguous on {q.device}")
