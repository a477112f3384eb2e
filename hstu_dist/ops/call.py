"""The plain-tensor form of one attention call, which the backends receive already checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from hstu_dist.ops.spec import AttentionSpec


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """Arguments of one call; the fields mean what they mean in `JaggedLayout` and `RelativeBias`.

    q is [T, H, Q], k [T_keys, H, Q], v [T_keys, H, V]; heads and width are contiguous within a row, rows
    may be strided. `key_offsets` is `offsets` itself where nothing is cached.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    offsets: Tensor
    key_offsets: Tensor
    num_contextual: Tensor | None
    num_targets: Tensor | None
    position_weight: Tensor | None
    time_weight: Tensor | None
    query_times: Tensor | None
    key_times: Tensor | None
    max_length: int
    max_key_length: int
    spec: AttentionSpec


class Gradients(NamedTuple):
    """Gradients of one call; the bias entries are None where the call has no such weight."""

    q: Tensor
    k: Tensor
    v: Tensor
    position_weight: Tensor | None
    time_weight: Tensor | None


class AttentionBackend(Protocol):
    """What a backend module offers; `backends.load` finds it by name."""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Output [T, H, V] and the log-sum-exp [H, T] that a softmax backward needs (empty otherwise)."""

    def backward(self, call: AttentionCall, out: Tensor, lse: Tensor, grad_out: Tensor) -> Gradients:
        """Gradients of all differentiable arguments for `grad_out` [T, H, V]."""
