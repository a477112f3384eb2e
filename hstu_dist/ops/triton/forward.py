"""Forward kernel: one program computes the output of one tile of queries of one sequence and head."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# the functions below are compiled by Triton: Python's types mean nothing to it

from __future__ import annotations

import triton
import triton.language as tl

from hstu_dist.ops.triton.tiles import (
    LOG2_E,
    add_bias,
    key_tile,
    load_rows,
    place_queries,
    side,
    sigmoid,
    store_rows,
    visible,
    walk_keys,
)
from hstu_dist.ops.triton.times import base_time


@triton.jit
def _soften(b_s, m_s, b_max, b_sum):
    """One step of the running softmax: weights, the factor that rescales what came before, and the new max and sum."""
    b_s = tl.where(m_s, b_s, float("-inf"))
    new_max = tl.maximum(b_max, tl.max(b_s, 1))
    # a row that has seen no key yet
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    b_p = tl.exp2((b_s - shift[:, None]) * LOG2_E)
    rescale = tl.exp2((b_max - shift) * LOG2_E)
    return b_p, rescale, new_max, b_sum * rescale + tl.sum(b_p, 1)


@triton.jit
def _attend(tensors, sequences, bias, problem, place, V: tl.constexpr):
    """Output of one tile of queries, over all its tiles of keys."""
    M: tl.constexpr = V.q.rows
    N: tl.constexpr = V.k.rows
    WIDTH: tl.constexpr = V.v.padded
    span, head, first, row, limit = place
    position = span.keys - span.queries + first
    base = base_time(bias.query_times, row)
    query = side(bias.query_times, base, position, row, limit, V.queries)
    b_q = load_rows(tensors.q, row, head, limit, V.q)  # [M, Q]
    b_out = tl.zeros([M, WIDTH], tl.float32)
    b_max = tl.full([M], float("-inf"), tl.float32)
    b_sum = tl.zeros([M], tl.float32)

    walk = walk_keys(position, tl.minimum(position + M, span.keys), span, sequences, V)
    for step in range(0, walk.total):
        start = key_tile(step, walk, sequences, V) * N
        key_row = span.key_row + start
        b_k = load_rows(tensors.k, key_row, head, span.keys - start, V.k)  # [N, Q]
        key = side(bias.key_times, base, start, key_row, span.keys - start, V.keys)
        b_bias = add_bias(tl.zeros([M, N], tl.float32), query, key, span, bias, V)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=V.precision) * problem.alpha + b_bias  # [M, N]
        m_s = visible(query, key, span, sequences, V)
        if V.softmax:
            b_p, rescale, b_max, b_sum = _soften(b_s, m_s, b_max, b_sum)
            b_out *= rescale[:, None]
        else:
            b_p = b_s * tl.where(m_s, sigmoid(b_s, V), 0.0)
        b_v = load_rows(tensors.v, key_row, head, span.keys - start, V.v)  # [N, V]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=V.precision)

    if V.softmax:
        b_out /= b_sum[:, None]
        r = tl.arange(0, M)
        lse = b_max + tl.log(b_sum)
        tl.store(tensors.softmax.lse + head * tensors.softmax.total + row + r, lse, mask=r < limit)
    store_rows(tensors.out, row, head, limit, b_out * problem.scale, V.out)


@triton.jit(do_not_specialize=["problem"])
def forward_kernel(tensors, sequences, bias, problem, V: tl.constexpr):
    """Writes `tensors.out` and, for softmax, `tensors.softmax.lse`; grid: tiles x heads x sequences."""
    place = place_queries(sequences, problem, V)
    if place.limit <= 0:
        return
    if sequences.far is None or place.span.far == 0:
        _attend(tensors, sequences, bias, problem, place, V)
    else:
        _attend(tensors, sequences, bias, problem, place, V.slow)
