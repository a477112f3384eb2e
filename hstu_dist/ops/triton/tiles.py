"""What all kernels share: where a sequence lies, which tiles meet, the mask, the bias and the activation.

Tiles of scores have queries down and keys across, [M, N], or the other way round in the pass over keys; positions
come as columns or rows ([M, 1], [1, N], ...), so that the helpers serve both.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# the functions below are compiled by Triton: Python's types mean nothing to it

from __future__ import annotations

import triton
import triton.language as tl

from hstu_dist.ops.triton.arguments import Place, Side, Span, Walk
from hstu_dist.ops.triton.times import look_up, time_buckets

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def span_of(sequences, index):
    """Sequence `index` of the batch."""
    query_row = tl.load(sequences.offsets + index)
    queries = (tl.load(sequences.offsets + index + 1) - query_row).to(tl.int32)
    if sequences.key_offsets is None:
        key_row = query_row
        keys = queries
    else:
        key_row = tl.load(sequences.key_offsets + index)
        keys = (tl.load(sequences.key_offsets + index + 1) - key_row).to(tl.int32)
    contextual = 0
    if sequences.contextual is not None:
        contextual = tl.load(sequences.contextual + index).to(tl.int32)
    history = keys
    if sequences.targets is not None:
        history = keys - tl.load(sequences.targets + index).to(tl.int32)
    far = 0
    if sequences.far is not None:
        far = tl.load(sequences.far + index)
    return Span(query_row, key_row, queries, keys, contextual, history, far)


@triton.jit
def place_queries(sequences, problem, V: tl.constexpr):
    """The tile of queries of this program, in a grid of tiles x heads x sequences."""
    program = tl.program_id(0)
    # the last tiles have the most keys: they start first
    first = (problem.tiles - 1 - program % problem.tiles) * V.q.rows
    span = span_of(sequences, program // problem.tiles // problem.heads)
    head = program // problem.tiles % problem.heads
    return Place(span, head, first, span.query_row + first, span.queries - first)


@triton.jit
def place_keys(sequences, problem, V: tl.constexpr):
    """The tile of keys of this program, in a grid of tiles x heads x sequences."""
    program = tl.program_id(0)
    first = program % problem.tiles * V.k.rows
    span = span_of(sequences, program // problem.tiles // problem.heads)
    head = program // problem.tiles % problem.heads
    return Place(span, head, first, span.key_row + first, span.keys - first)


@triton.jit
def _pointers(rows, row, head, TILE: tl.constexpr):
    # the first row is found in 64 bits; offsets within a tile fit in 32
    first = rows.pointer + row.to(tl.int64) * rows.stride + head * TILE.width
    r = tl.arange(0, TILE.rows)[:, None]
    c = tl.arange(0, TILE.padded)[None, :]
    return first + (r * rows.stride + c)


@triton.jit
def _inside(limit, TILE: tl.constexpr):
    m = (tl.arange(0, TILE.rows) < limit)[:, None]
    if TILE.width != TILE.padded:
        m = m & (tl.arange(0, TILE.padded) < TILE.width)[None, :]
    return m


@triton.jit
def load_rows(rows, row, head, limit, TILE: tl.constexpr):
    """[TILE.rows, TILE.padded] from `row` on; zeros from `limit` rows on."""
    return tl.load(_pointers(rows, row, head, TILE), mask=_inside(limit, TILE), other=0.0)


@triton.jit
def store_rows(rows, row, head, limit, b_x, TILE: tl.constexpr):
    """Writes the first `limit` rows of a tile."""
    tl.store(_pointers(rows, row, head, TILE), b_x.to(rows.pointer.dtype.element_ty), mask=_inside(limit, TILE))


@triton.jit
def load_vector(pointer, row, limit, BLOCK: tl.constexpr, other):
    """[BLOCK] from `row` on; `other` from `limit` on."""
    r = tl.arange(0, BLOCK)
    return tl.load(pointer + row + r, mask=r < limit, other=other)


@triton.jit
def walk_keys(first, stop, span, sequences, V: tl.constexpr):
    """Key tiles that queries at positions first..stop-1 can see."""
    N: tl.constexpr = V.k.rows
    end = stop
    if sequences.targets is not None:
        end = tl.minimum(stop, span.history)
    if sequences.contextual is not None:
        end = tl.where(first < span.contextual, tl.maximum(end, span.contextual), end)
    end = tl.cdiv(end, N)
    prefix = 0
    begin = 0
    if V.window > 0:
        reach = tl.maximum(span.contextual, V.prefix)
        prefix = tl.minimum(tl.cdiv(reach, N), end)
        oldest = tl.maximum(tl.minimum(first, span.history) - V.window + 1, 0)
        begin = tl.minimum(tl.maximum(oldest // N, prefix), end)
    main_end = prefix + end - begin
    own = 0
    total = main_end
    if sequences.targets is not None:
        own = tl.maximum(tl.maximum(first, span.history) // N, end)
        total = main_end + tl.maximum(tl.cdiv(stop, N) - own, 0)
    return Walk(prefix, begin, main_end, own, total)


@triton.jit
def key_tile(step, walk, sequences, V: tl.constexpr):
    """Index of the key tile of a step of a walk."""
    tile = step
    if V.window > 0:
        tile = tl.where(step >= walk.prefix, step - walk.prefix + walk.begin, tile)
    if sequences.targets is not None:
        tile = tl.where(step >= walk.main_end, step - walk.main_end + walk.own, tile)
    return tile


@triton.jit
def walk_queries(first, stop, span, sequences, V: tl.constexpr):
    """Query tiles [begin, end) that can see keys at positions first..stop-1: always one run."""
    M: tl.constexpr = V.q.rows
    low = first
    high = span.keys
    if V.window > 0:
        # targets look from the end of the history; the last query that is not one looks from before it
        in_reach = (span.history - stop < V.window - 1) | (first < tl.maximum(span.contextual, V.prefix))
        high = tl.where(in_reach, span.keys, tl.minimum(stop - 1 + V.window, span.keys))
    if sequences.targets is not None:
        high = tl.where(first >= span.history, stop, high)
    if sequences.contextual is not None:
        low = tl.where(first < span.contextual, 0, low)
    cached = span.keys - span.queries
    return tl.maximum(low - cached, 0) // M, tl.cdiv(tl.maximum(high - cached, 0), M)


@triton.jit
def visible(query, key, span, sequences, V: tl.constexpr):
    """Mask of a tile (see `mask.visible`); rows or columns beyond the sequence may come out either way."""
    i = query.position
    j = key.position
    seen = j <= i
    if sequences.targets is not None:
        seen = seen & (j < span.history)
    if V.window > 0:
        near = tl.minimum(i, span.history) - j < V.window
        seen = seen & (near | (j < tl.maximum(span.contextual, V.prefix)))
    if sequences.targets is not None:
        seen = seen | (i == j)
    if sequences.contextual is not None:
        seen = tl.where(i < span.contextual, j < span.contextual, seen)
    return seen


@triton.jit
def effective(position, span):
    """Positions for the bias: targets share one; those beyond the sequence are brought back inside it."""
    return tl.minimum(position, tl.minimum(span.history, span.keys - 1))


@triton.jit
def side(times, base, position, row, limit, LINE: tl.constexpr):
    """Queries or keys of a tile of scores: positions, and times since `base` where there are any."""
    r = tl.arange(0, LINE.rows)
    positions = position + r
    seconds = 0
    if times is not None:
        seconds = (tl.load(times + row + r, mask=r < limit, other=base) - base).to(tl.int32)
        seconds = seconds[:, None] if LINE.down else seconds[None, :]
    return Side(position, positions[:, None] if LINE.down else positions[None, :], seconds, row, limit)


@triton.jit
def add_position_bias(b_s, query, key, span, bias):
    """Scores with the bias of each pair's distance."""
    S: tl.constexpr = 2 * max(b_s.shape[0], b_s.shape[1])
    # the distances of a tile are a run of fewer than S
    least = effective(key.first, span) - effective(query.first + query.position.numel - 1, span)
    distance = least + tl.arange(0, S)
    b_table = tl.load(bias.position + bias.center + distance, mask=tl.abs(distance) <= bias.center, other=0.0)
    index = effective(key.position, span) - effective(query.position, span) - least
    return b_s + look_up(b_table.to(tl.float32), index)


@triton.jit
def add_time_bias(b_s, b_bucket, bias):
    """Scores with the bias of each pair's time bucket."""
    b = tl.arange(0, 256)
    b_table = tl.load(bias.time + b, mask=b < 129, other=0.0)
    return b_s + look_up(b_table.to(tl.float32), b_bucket)


@triton.jit
def add_bias(b_s, query, key, span, bias, V: tl.constexpr):
    """Scores with position and time bias, where there are any."""
    if bias.position is not None:
        b_s = add_position_bias(b_s, query, key, span, bias)
    if bias.time is not None:
        b_s = add_time_bias(b_s, time_buckets(query, key, bias, V), bias)
    return b_s


@triton.jit
def sigmoid(b_s, V: tl.constexpr):
    """1 / (1 + e^-s)."""
    b_x = 1.0 + tl.exp2(b_s * -LOG2_E)
    if V.exact:
        b_sigma = 1.0 / b_x
    else:
        # x >= 1 needs none of the range reduction that a division does; the square is right to 21 bits
        b_root = tl.rsqrt(b_x)
        b_sigma = b_root * b_root
    return b_sigma


@triton.jit
def weights_and_slope(b_s, m_s, lse, V: tl.constexpr):
    """Attention weights p and the part of their slope that multiplies grad p; both zero where hidden.

    SiLU: p = s sigma and dp/ds. Softmax: p = e^(s - lse), and p again, as ds = p (grad p - delta).
    """
    if V.softmax:
        b_p = tl.where(m_s, tl.exp2((b_s - lse) * LOG2_E), 0.0)
        b_slope = b_p
    else:
        b_sigma = tl.where(m_s, sigmoid(b_s, V), 0.0)
        b_p = b_s * b_sigma
        # sigma (1 + s (1 - sigma))
        b_slope = b_p + b_sigma * (1.0 - b_p)
    return b_p, b_slope
