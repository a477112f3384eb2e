"""Backward kernels of queries, keys and values: two passes, each with its own accumulators.

Both recompute the scores. In return every gradient is a sum in a fixed order, and no pass holds more accumulators
than there are registers.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# the functions below are compiled by Triton: Python's types mean nothing to it

from __future__ import annotations

import triton
import triton.language as tl

from hstu_dist.ops.triton.tiles import (
    add_bias,
    key_tile,
    load_rows,
    load_vector,
    place_keys,
    place_queries,
    side,
    store_rows,
    visible,
    walk_keys,
    walk_queries,
    weights_and_slope,
)
from hstu_dist.ops.triton.times import base_time


@triton.jit
def _meet_keys(start, query, own, place, call, V: tl.constexpr):
    """For the tile of keys at position `start`: the keys, the gradient of the weights, the weights, their slope."""
    M: tl.constexpr = V.q.rows
    N: tl.constexpr = V.k.rows
    tensors, sequences, bias, problem = call
    b_q, b_grad, base, lse = own
    span = place.span
    key_row = span.key_row + start
    key = side(bias.key_times, base, start, key_row, span.keys - start, V.keys)
    b_k = load_rows(tensors.k, key_row, place.head, span.keys - start, V.k)  # [N, Q]
    b_v = load_rows(tensors.v, key_row, place.head, span.keys - start, V.v)  # [N, V]
    b_bias = add_bias(tl.zeros([M, N], tl.float32), query, key, span, bias, V)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=V.precision) * problem.alpha + b_bias  # [M, N]
    b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision=V.precision)  # [M, N]
    m_s = visible(query, key, span, sequences, V)
    b_p, b_slope = weights_and_slope(b_s, m_s, lse, V)
    return b_k, b_dp, b_p, b_slope


@triton.jit
def _row_means(walk, query, own, place, call, V: tl.constexpr):
    """Mean of the weights' gradient under the weights, [M]: what a softmax subtracts.

    It equals the row sum of out * grad_out. But a bias gradient adds up whole rows, and only a mean of the very numbers
    that they are made of cancels with them.
    """
    M: tl.constexpr = V.q.rows
    b_weighted = tl.zeros([M], tl.float32)
    b_weights = tl.zeros([M], tl.float32)
    for step in range(0, walk.total):
        start = key_tile(step, walk, call[1], V) * V.k.rows
        _, b_dp, b_p, _ = _meet_keys(start, query, own, place, call, V)
        b_weighted += tl.sum(b_p * b_dp, 1)
        b_weights += tl.sum(b_p, 1)
    return b_weighted / tl.where(tl.arange(0, M) < place.limit, b_weights, 1.0)


@triton.jit
def _query_gradient(tensors, sequences, bias, problem, place, V: tl.constexpr):
    """Gradient of one tile of queries, over all its tiles of keys."""
    M: tl.constexpr = V.q.rows
    WIDTH: tl.constexpr = V.q.padded
    span, head, first, row, limit = place
    position = span.keys - span.queries + first
    base = base_time(bias.query_times, row)
    query = side(bias.query_times, base, position, row, limit, V.queries)
    b_q = load_rows(tensors.q, row, head, limit, V.q)  # [M, Q]
    b_grad = load_rows(tensors.grad_out, row, head, limit, V.out)  # [M, V]
    b_dq = tl.zeros([M, WIDTH], tl.float32)
    lse = 0.0
    if V.softmax:
        saved = head * tensors.softmax.total + row
        # infinite for rows beyond the sequence: their weights vanish
        lse = load_vector(tensors.softmax.lse, saved, limit, M, float("inf"))[:, None]

    call = (tensors, sequences, bias, problem)
    own = (b_q, b_grad, base, lse)
    walk = walk_keys(position, tl.minimum(position + M, span.keys), span, sequences, V)
    if V.softmax:
        if V.exact:
            delta = _row_means(walk, query, own, place, call, V)
        else:
            # 16-bit numbers round more than this loses
            b_out = load_rows(tensors.out, row, head, limit, V.out)  # [M, V]
            delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
        r = tl.arange(0, M)
        tl.store(tensors.softmax.delta + saved + r, delta, mask=r < limit)
    for step in range(0, walk.total):
        start = key_tile(step, walk, sequences, V) * V.k.rows
        b_k, b_dp, _, b_slope = _meet_keys(start, query, own, place, call, V)
        if V.softmax:
            b_dp -= delta[:, None]
        b_ds = b_dp * b_slope
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=V.precision)

    store_rows(tensors.dq, row, head, limit, b_dq * (problem.alpha * problem.scale), V.q)


@triton.jit(do_not_specialize=["problem"])
def query_kernel(tensors, sequences, bias, problem, V: tl.constexpr):
    """Writes `tensors.dq`; for softmax also `tensors.softmax.delta`, which the other passes read."""
    place = place_queries(sequences, problem, V)
    if place.limit <= 0:
        return
    if sequences.far is None or place.span.far == 0:
        _query_gradient(tensors, sequences, bias, problem, place, V)
    else:
        _query_gradient(tensors, sequences, bias, problem, place, V.slow)


@triton.jit
def _key_gradients(tensors, sequences, bias, problem, place, V: tl.constexpr):
    """Gradients of one tile of keys and values, over all its tiles of queries; scores are transposed, [N, M]."""
    M: tl.constexpr = V.q.rows
    N: tl.constexpr = V.k.rows
    WIDTH: tl.constexpr = V.k.padded
    VALUE_WIDTH: tl.constexpr = V.v.padded
    span, head, start, key_row, key_limit = place
    base = base_time(bias.key_times, key_row)
    key = side(bias.key_times, base, start, key_row, key_limit, V.keys)
    b_k = load_rows(tensors.k, key_row, head, key_limit, V.k)  # [N, Q]
    b_v = load_rows(tensors.v, key_row, head, key_limit, V.v)  # [N, V]
    b_dk = tl.zeros([N, WIDTH], tl.float32)
    b_dv = tl.zeros([N, VALUE_WIDTH], tl.float32)

    begin, end = walk_queries(start, tl.minimum(start + N, span.keys), span, sequences, V)
    for tile in range(begin, end):
        first = tile * M
        row = span.query_row + first
        limit = span.queries - first
        query = side(bias.query_times, base, span.keys - span.queries + first, row, limit, V.queries)
        b_q = load_rows(tensors.q, row, head, limit, V.q)  # [M, Q]
        b_grad = load_rows(tensors.grad_out, row, head, limit, V.out)  # [M, V]
        b_bias = add_bias(tl.zeros([N, M], tl.float32), query, key, span, bias, V)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=V.precision) * problem.alpha + b_bias  # [N, M]
        m_s = visible(query, key, span, sequences, V)
        lse = 0.0
        if V.softmax:
            saved = head * tensors.softmax.total + row
            # infinite for rows beyond the sequence: their weights vanish
            lse = load_vector(tensors.softmax.lse, saved, limit, M, float("inf"))[None, :]
        b_p, b_slope = weights_and_slope(b_s, m_s, lse, V)
        b_dv = tl.dot(b_p.to(b_grad.dtype), b_grad, b_dv, input_precision=V.precision)
        b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision=V.precision)  # [N, M]
        if V.softmax:
            b_dp -= load_vector(tensors.softmax.delta, saved, limit, M, 0.0)[None, :]
        b_ds = b_dp * b_slope
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=V.precision)

    store_rows(tensors.dk, key_row, head, key_limit, b_dk * (problem.alpha * problem.scale), V.k)
    store_rows(tensors.dv, key_row, head, key_limit, b_dv * problem.scale, V.v)


@triton.jit(do_not_specialize=["problem"])
def key_kernel(tensors, sequences, bias, problem, V: tl.constexpr):
    """Writes `tensors.dk` and `tensors.dv`; grid: tiles of keys x heads x sequences."""
    place = place_keys(sequences, problem, V)
    if place.limit <= 0:
        return
    if sequences.far is None or place.span.far == 0:
        _key_gradients(tensors, sequences, bias, problem, place, V)
    else:
        _key_gradients(tensors, sequences, bias, problem, place, V.slow)
