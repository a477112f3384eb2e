"""What the kernels are given: named bundles of pointers and numbers, and the choices fixed at compile time.

A field that is None is known to the compiler, which leaves out the feature that would have used it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """A tensor [rows, H, width] whose heads and width are contiguous."""

    pointer: Tensor
    stride: int


class Sequences(NamedTuple):
    """Fields of `JaggedLayout`; None where the feature is off (`key_offsets`: the same as `offsets`).

    `far` is [B] int32, or None without times: not 0 where a sequence spans more time than int32 seconds can say.
    """

    offsets: Tensor
    key_offsets: Tensor | None
    contextual: Tensor | None
    targets: Tensor | None
    far: Tensor | None


class Bias(NamedTuple):
    """Fields of `RelativeBias`; `center` is the index of distance 0, `thresholds` the first second of each bucket."""

    position: Tensor | None
    center: int
    time: Tensor | None
    thresholds: Tensor | None
    query_times: Tensor | None
    key_times: Tensor | None


class Softmax(NamedTuple):
    """What a softmax keeps of each row, fp32 [H, T]: log-sum-exp and, in the backward, the mean that ds subtracts."""

    lse: Tensor
    delta: Tensor | None
    total: int


class ForwardTensors(NamedTuple):
    """Tensors of the forward kernel."""

    q: Rows
    k: Rows
    v: Rows
    out: Rows
    softmax: Softmax | None


class BackwardTensors(NamedTuple):
    """Tensors of the backward kernels; `out` only for softmax, each gradient only for the kernel that writes it.

    `d_position` is [programs, 2N-1] and `d_time` [programs, 256], fp32: one row for each program.
    """

    q: Rows
    k: Rows
    v: Rows
    grad_out: Rows
    out: Rows | None
    softmax: Softmax | None
    dq: Rows | None = None
    dk: Rows | None = None
    dv: Rows | None = None
    d_position: Tensor | None = None
    d_time: Tensor | None = None


class Problem(NamedTuple):
    """Numbers that change from batch to batch, so that the compiler must not specialise on them.

    Attributes:
        tiles: tiles of the longest sequence.
        sequences: B.
        heads: H.
        alpha: scale of q k^T.
        scale: factor of all attention weights: 1/n, or 1 for softmax.
    """

    tiles: int
    sequences: int
    heads: int
    alpha: float
    scale: float


class Span(NamedTuple):
    """One sequence as a kernel sees it: first rows (int64) and sizes (int32)."""

    query_row: Any
    key_row: Any
    queries: Any
    keys: Any
    contextual: Any
    history: Any
    far: Any


class Side(NamedTuple):
    """Queries or keys of a tile of scores; positions and times int32, as a column or a row.

    Attributes:
        first: position of the first.
        position: positions in the sequence.
        time: seconds since the program's base time.
        row: first row in the batch.
        limit: how many rows there are from there on.
    """

    first: Any
    position: Any
    time: Any
    row: Any
    limit: Any


@dataclass(frozen=True)
class Line:
    """How a side of a tile of scores lies: `down` as a column, else as a row."""

    rows: int
    down: bool


class Place(NamedTuple):
    """Where a program's tile lies: its first index in the sequence, its first row, and how many rows follow."""

    span: Any
    head: Any
    first: Any
    row: Any
    limit: Any


class Pair(NamedTuple):
    """Where a tile of scores lies: first rows (int64) and how many rows there are from there on (int32)."""

    row: Any
    limit: Any
    key_row: Any
    key_limit: Any


class Walk(NamedTuple):
    """Key tiles that a query tile visits: a prefix, the history from `begin`, and the targets' own from `own`."""

    prefix: Any
    begin: Any
    main_end: Any
    own: Any
    total: Any


@dataclass(frozen=True)
class Tile:
    """Shape of a tile of rows: `width` true columns, held in `padded` (a power of two)."""

    rows: int
    width: int
    padded: int


@dataclass(frozen=True)
class Variant:
    """Choices a kernel is compiled for.

    Attributes:
        queries: the queries' side of a tile of scores.
        keys: the keys' side.
        q: tile of q and its gradient.
        k: tile of k and its gradient.
        v: tile of v and its gradient.
        out: tile of the output and its gradient.
        softmax: softmax, else SiLU.
        window: of `AttentionSpec`.
        prefix: `global_prefix` of `AttentionSpec`.
        exact: whether the inputs are float32, so that a fast reciprocal would show.
        precision: of matrix products of float32, as Triton names it.
        far: whether this is the slow path for sequences whose times need 64 bits.
    """

    queries: Line
    keys: Line

    q: Tile
    k: Tile
    v: Tile
    out: Tile
    softmax: bool
    window: int
    prefix: int
    exact: bool
    precision: str
    far: bool = False

    @property
    def slow(self) -> Variant:
        """The same for sequences whose times need 64 bits."""
        return replace(self, far=True)
