"""A moving average of all weights, for evaluation: the noise of the last steps averages out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.tensor import DTensor

_WARMUP = 10
"""The first average forgets the random start: step t averages over about t / 9 steps, until the decay is reached."""

_EXCHANGED_ELEMENTS = 1 << 20


class WeightAverage:
    """Exponential moving average of tensors, sharded as they are.

    Attributes:
        averages: name → average, plain or sharded like the weight of that name.
    """

    def __init__(self, weights: Mapping[str, Any], decay: float) -> None:
        """Begins with the present values.

        Args:
            weights: plain or sharded, updated in place, one tensor under several names allowed; those that are not
                floating, such as masks, have no average.
            decay: share of the old average that a step keeps, in (0, 1).
        """
        self.decay = decay
        self.averages: dict[str, Any] = {
            name: _copy(weight) for name, weight in weights.items() if weight.dtype.is_floating_point
        }
        self._pairs = [
            pair
            for name, average in self.averages.items()
            for pair in zip(_local(weights[name]), _local(average), strict=True)
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step `step`, counted from 1."""
        decay = min(self.decay, step / (_WARMUP + step))
        for weight, average in self._pairs:
            average.lerp_(weight, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the weights are the averages."""
        _exchange(self._pairs)
        try:
            yield
        finally:
            # in the opposite order, which matters to a tensor of several names
            _exchange(self._pairs[::-1])


@torch.no_grad()
def _exchange(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for weight, average in pairs:
        # in parts: a table is too large for a third copy of it
        rows = max(1, _EXCHANGED_ELEMENTS * weight.shape[0] // max(1, weight.numel())) if weight.dim() else 1
        parts = zip(weight.split(rows), average.split(rows), strict=True) if weight.dim() else [(weight, average)]
        for one, other in parts:
            held = one.clone()
            one.copy_(other)
            other.copy_(held)


def _local(value: Any) -> list[Tensor]:
    """What this rank holds of a tensor; the memory itself, no copy."""
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    if isinstance(value, DTensor):
        # a slice of a DTensor can be a copy
        return [value.to_local().detach()]
    return [value.detach()]


def _copy(value: Any) -> Any:
    if not isinstance(value, ShardedTensor):
        return value.detach().clone()
    shards = [Shard(shard.tensor.detach().clone(), shard.metadata) for shard in value.local_shards()]
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, value.metadata(), value._process_group)
