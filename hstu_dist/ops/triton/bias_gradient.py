"""Backward kernel of the bias tables: a fixed number of programs, each with tables of its own, no racing additions.

The tables are shared by all heads, so a program sums the gradient of a tile of scores over the heads first and sorts
the sum into positions and buckets once.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# the functions below are compiled by Triton: Python's types mean nothing to it

from __future__ import annotations

import triton
import triton.language as tl

from hstu_dist.ops.triton.arguments import Pair
from hstu_dist.ops.triton.tiles import (
    add_position_bias,
    add_time_bias,
    effective,
    key_tile,
    load_rows,
    load_vector,
    side,
    span_of,
    visible,
    walk_keys,
    weights_and_slope,
)
from hstu_dist.ops.triton.times import base_time, time_buckets

_BINS = tl.constexpr(256)


@triton.jit
def score_gradient(tensors, pair, b_bias, m_s, problem, V: tl.constexpr):
    """[M, N] gradient of the scores, summed over the heads, for a tile of bias."""
    M: tl.constexpr = V.q.rows
    N: tl.constexpr = V.k.rows
    b_ds = tl.zeros([M, N], tl.float32)
    for head in range(0, problem.heads):
        b_q = load_rows(tensors.q, pair.row, head, pair.limit, V.q)  # [M, Q]
        b_k = load_rows(tensors.k, pair.key_row, head, pair.key_limit, V.k)  # [N, Q]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=V.precision) * problem.alpha + b_bias
        b_grad = load_rows(tensors.grad_out, pair.row, head, pair.limit, V.out)  # [M, V]
        b_v = load_rows(tensors.v, pair.key_row, head, pair.key_limit, V.v)  # [N, V]
        b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision=V.precision)  # [M, N]
        lse = 0.0
        if V.softmax:
            saved = head * tensors.softmax.total + pair.row
            lse = load_vector(tensors.softmax.lse, saved, pair.limit, M, float("inf"))[:, None]
            b_dp -= load_vector(tensors.softmax.delta, saved, pair.limit, M, 0.0)[:, None]
        _, b_slope = weights_and_slope(b_s, m_s, lse, V)
        b_ds += b_dp * b_slope
    return b_ds * problem.scale


@triton.jit
def add_distances(table, b_ds, query, key, context, V: tl.constexpr):
    """Adds a square tile's gradient to the position table, whose middle is `table`.

    All pairs on a diagonal are at one distance: rotating row r by r turns diagonals into columns.
    """
    span, sequences, bias = context
    N: tl.constexpr = V.k.rows
    i = effective(query.position, span)  # [N, 1]
    i_first = effective(query.first, span)
    d = tl.arange(0, N)
    # barriers: one program's additions to one entry must keep their order
    tl.debug_barrier()
    if sequences.targets is not None:
        # a target and its own key are at distance 0, wherever they lie
        own = (query.position == key.position) & (key.position >= span.history)
        tl.atomic_add(table, tl.sum(tl.where(own, b_ds, 0.0)), sem="relaxed")
        b_ds = tl.where(own, 0.0, b_ds)
    turned = i - i_first + d[None, :]
    b_ds = tl.gather(b_ds, turned & (N - 1), 1)
    near = tl.sum(tl.where(turned < N, b_ds, 0.0), 0)
    far = tl.sum(tl.where(turned < N, 0.0, b_ds), 0)
    distance = key.first - i_first + d
    tl.debug_barrier()
    tl.atomic_add(table + distance, near, mask=tl.abs(distance) <= bias.center, sem="relaxed")
    distance -= N
    tl.debug_barrier()
    tl.atomic_add(table + distance, far, mask=tl.abs(distance) <= bias.center, sem="relaxed")


@triton.jit
def add_buckets(b_bins, b_ds, b_bucket):
    """Adds a tile's gradient to the time buckets that occur in it, one by one: few do, away from the diagonal."""
    # hidden pairs have no gradient
    b_bucket = tl.where(b_ds != 0.0, b_bucket, _BINS)
    # flat, so that each thread sums its own share before threads exchange anything
    b_ds = tl.reshape(b_ds, [b_ds.numel])
    b_bucket = tl.reshape(b_bucket, [b_bucket.numel])
    bins = tl.arange(0, _BINS)
    bucket = tl.min(b_bucket, 0)
    while bucket < _BINS:
        b_bins += tl.where(bins == bucket, tl.sum(tl.where(b_bucket == bucket, b_ds, 0.0), 0), 0.0)
        bucket = tl.min(tl.where(b_bucket > bucket, b_bucket, _BINS), 0)
    return b_bins


@triton.jit(do_not_specialize=["problem"])
def bias_kernel(tensors, sequences, bias, problem, V: tl.constexpr):
    """Adds to this program's row of `tensors.d_position` and writes its row of `tensors.d_time`."""
    M: tl.constexpr = V.q.rows
    N: tl.constexpr = V.k.rows
    tl.static_assert(M == N, "diagonals are taken of square tiles")
    program = tl.program_id(0)
    d_position = tensors.d_position
    if bias.position is not None:
        d_position += program.to(tl.int64) * (2 * bias.center + 1) + bias.center
    b_bins = tl.zeros([_BINS], tl.float32)
    # the longest tiles come first and are dealt out in turn
    for item in range(program, problem.tiles * problem.sequences, tl.num_programs(0)):
        first = (problem.tiles - 1 - item // problem.sequences) * M
        span = span_of(sequences, item % problem.sequences)
        limit = span.queries - first
        position = span.keys - span.queries + first
        row = span.query_row + first
        base = tl.full([], 0, tl.int64)
        if limit > 0:
            base = base_time(bias.query_times, row)
        query = side(bias.query_times, base, position, row, limit, V.queries)
        walk = walk_keys(position, tl.minimum(position + M, span.keys), span, sequences, V)
        for step in range(0, tl.where(limit > 0, walk.total, 0)):
            start = key_tile(step, walk, sequences, V) * N
            pair = Pair(row, limit, span.key_row + start, span.keys - start)
            key = side(bias.key_times, base, start, pair.key_row, pair.key_limit, V.keys)
            m_s = visible(query, key, span, sequences, V)
            b_bias = tl.zeros([M, N], tl.float32)
            if bias.position is not None:
                b_bias = add_position_bias(b_bias, query, key, span, bias)
            if bias.time is not None:
                if span.far == 0:
                    b_bucket = time_buckets(query, key, bias, V)
                else:
                    b_bucket = time_buckets(query, key, bias, V.slow)
                b_bias = add_time_bias(b_bias, b_bucket, bias)
            b_ds = score_gradient(tensors, pair, b_bias, m_s, problem, V)
            if bias.time is not None:
                b_bins = add_buckets(b_bins, b_ds, b_bucket)
            if bias.position is not None:
                add_distances(d_position, b_ds, query, key, (span, sequences, bias), V)
    if bias.time is not None:
        bins = tl.arange(0, _BINS)
        tl.store(tensors.d_time + program * _BINS + bins, b_bins)
