"""Time buckets inside a kernel, exactly those of `bias.time_bucket`, and which sequences need 64 bits for them."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# the functions below are compiled by Triton: Python's types mean nothing to it

from __future__ import annotations

import triton
import triton.language as tl

_ONE = tl.constexpr(0x3F800000)
_BUCKETS_PER_OCTAVE = tl.constexpr(int(0.6931471805599453 / 0.301 * 512))
_INT32_MAX = tl.constexpr(2**31 - 1)
_LIMIT = tl.constexpr(2**62)


@triton.jit
def base_time(times, row):
    """Time of a row, from which the times of a program are counted."""
    base = tl.full([], 0, tl.int64)
    if times is not None:
        base = tl.load(times + row)
    return base


@triton.jit
def look_up(b_table, index):
    """Table entries [rows, columns] for a tile of indices; through shared memory, with 32-bit addresses."""
    flat = tl.gather(b_table, tl.reshape(index, [index.numel]), 0)
    return tl.reshape(flat, index.shape)


@triton.jit
def _near_buckets(elapsed, thresholds):
    """Time buckets of int32 seconds: a guess that is right or one short, then one comparison.

    The bits of a float, read as an integer, are its logarithm to base 2, or up to 0.09 less.
    """
    magnitude = tl.maximum(tl.abs(elapsed), 1)
    octaves = magnitude.to(tl.float32).to(tl.int32, bitcast=True) - _ONE
    # rounded down throughout, so that the guess is never too high; the product stays below 2^31
    candidate = ((octaves >> 8) * _BUCKETS_PER_OCTAVE >> 24) + 1
    b_first = tl.load(thresholds + tl.arange(0, 128))
    b_first = tl.minimum(b_first, _INT32_MAX).to(tl.int32)
    return candidate - (magnitude < look_up(b_first, candidate)).to(tl.int32)


@triton.jit
def _times_of(times, x):
    r = tl.reshape(tl.arange(0, x.position.numel), x.position.shape)
    return tl.load(times + x.row + r, mask=r < x.limit, other=0)


@triton.jit
def _far_buckets(query, key, bias):
    """Time buckets of any times within 2^62 of zero: counts the thresholds between two times, slowly."""
    q = _times_of(bias.query_times, query)
    k = _times_of(bias.key_times, key)
    b_bucket = tl.zeros_like(query.time - key.time)
    for b in range(1, 129):
        # the threshold is added to the edges of the tile, so that no tile of int64 is held
        first = tl.load(bias.thresholds + b)
        b_bucket += ((q >= k + first) | (k >= q + first)).to(tl.int32)
    return b_bucket


@triton.jit
def time_buckets(query, key, bias, V: tl.constexpr):
    """Bucket of each pair of a tile; `V.far` where the sequence spans more than int32 seconds."""
    return _far_buckets(query, key, bias) if V.far else _near_buckets(query.time - key.time, bias.thresholds)


@triton.jit
def _extremes(times, start, stop, low, high):
    for first in range(start, stop, 1024):
        rows = first + tl.arange(0, 1024)
        seconds = tl.load(times + rows, mask=rows < stop, other=tl.load(times + start))
        low = tl.minimum(low, tl.min(seconds, 0))
        high = tl.maximum(high, tl.max(seconds, 0))
    return low, high


@triton.jit
def far_kernel(sequences, bias):
    """Writes `sequences.far`: 1 where the times of a sequence do not fit in int32 seconds, counted from each other."""
    index = tl.program_id(0)
    low = tl.full([], _LIMIT, tl.int64)
    high = tl.full([], -_LIMIT, tl.int64)
    start = tl.load(sequences.offsets + index)
    stop = tl.load(sequences.offsets + index + 1)
    low, high = _extremes(bias.query_times, start, stop, low, high)
    if sequences.key_offsets is not None:
        start = tl.load(sequences.key_offsets + index)
        stop = tl.load(sequences.key_offsets + index + 1)
    low, high = _extremes(bias.key_times, start, stop, low, high)
    tl.store(sequences.far + index, (high - low >= _INT32_MAX).to(tl.int32))
