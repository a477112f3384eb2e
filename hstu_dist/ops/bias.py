"""Relative attention bias rab^{p,t}: one weight per distance and one per bucket of elapsed time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TIME_BUCKETS = 129
"""Size of the time table: buckets 0..128."""

BUCKET_WIDTH = 0.301
"""Width of a bucket in ln(seconds); about a factor of 1.35 in elapsed time."""


def time_bucket(elapsed: Tensor) -> Tensor:
    """Bucket of an elapsed time: clamp(floor(ln(max(|dt|, 1)) / 0.301), 0, 128).

    Computed in float64: float32 would round times above 2^24 s into a neighbouring bucket.

    Args:
        elapsed: int64 seconds, any shape.

    Returns:
        int64 bucket in [0, 128], same shape.
    """
    # converted before abs: abs(int64 minimum) overflows
    log_seconds = elapsed.to(torch.float64).abs_().clamp_(min=1.0).log_()
    return log_seconds.div_(BUCKET_WIDTH).floor_().clamp_(0, NUM_TIME_BUCKETS - 1).to(torch.int64)


@dataclass(frozen=True, kw_only=True)
class RelativeBias:
    """Bias added to the attention scores of every head: w_pos[(N-1) + j - i] + w_ts[bucket(t_q - t_k)].

    The time part is optional; its three tensors come together or not at all.

    Attributes:
        position_weight: [2N-1] floating; N is the longest sequence it serves.
        time_weight: [129] floating, or None.
        query_times: [T] int64 seconds: when each query's prediction is made (in training the time of
            the NEXT event; at inference the request's time).
        key_times: [T_keys] int64 seconds: when each key happened.
    """

    position_weight: Tensor
    time_weight: Tensor | None = None
    query_times: Tensor | None = None
    key_times: Tensor | None = None

    @property
    def max_length(self) -> int:
        """N, the longest sequence that `position_weight` serves."""
        return (self.position_weight.numel() + 1) // 2


def next_event_times(timestamps: Tensor, offsets: Tensor) -> Tensor:
    """Query times of training: each event's successor in its sequence; the last event repeats its own.

    Args:
        timestamps: [T] int64 seconds.
        offsets: [B+1] int64.

    Returns:
        [T] int64 seconds.
    """
    if timestamps.numel() == 0:
        return timestamps.clone()
    following = torch.cat([timestamps[1:], timestamps[-1:]])
    ends = offsets[1:] - 1
    last = ends[offsets[1:] > offsets[:-1]]
    following[last] = timestamps[last]
    return following
