"""A moving average of all weights, for evaluation: the noise of the last steps averages out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

_WARMUP = 10
"""The first average forgets the random start: step t averages over about t / 9 steps, until the decay is reached."""


class WeightAverage:
    """Exponential moving average of tensors, sharded as they are.

    Attributes:
        averages: name → average, plain or sharded like the weight of that name.
    """

    def __init__(self, weights: Mapping[str, Any], decay: float) -> None:
        """Begins with the present values.

        Args:
            weights: floating tensors, plain or sharded, that are updated in place.
            decay: share of the old average that a step keeps, in (0, 1).
        """
        self.decay = decay
        self.averages: dict[str, Any] = {name: _copy(weight) for name, weight in weights.items()}
        self._pairs = [
            pair
            for name, weight in weights.items()
            for pair in zip(_local(weight), _local(self.averages[name]), strict=True)
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
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, average in self._pairs:
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)


def _local(value: Any) -> list[Tensor]:
    """What this rank holds of a tensor; the memory itself, no copy."""
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    return [value.detach()]


def _copy(value: Any) -> Any:
    if not isinstance(value, ShardedTensor):
        return value.detach().clone()
    shards = [Shard(shard.tensor.detach().clone(), shard.metadata) for shard in value.local_shards()]
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, value.metadata(), value._process_group)
