"""Saving while training goes on: copies of the tensors in host memory, and a thread that writes them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor


class HostCopies:
    """Host memory for this rank's parts of all tensors, kept from one save to the next."""

    def __init__(self) -> None:
        self._copies: dict[MetadataIndex, Tensor] = {}

    def take(self, tensors: Mapping[str, Any]) -> Mapping[MetadataIndex, Tensor]:
        """Copies the present values; valid until the next call.

        Args:
            tensors: flat dictionary of plain and sharded tensors.
        """
        on_gpu = False
        for name, value in tensors.items():
            for index, part in _parts(name, value):
                self._copy(index, part).copy_(part.detach(), non_blocking=True)
                on_gpu |= part.is_cuda
        if on_gpu:
            # copies to pinned memory return before they are done
            torch.cuda.synchronize()
        return self._copies

    def _copy(self, index: MetadataIndex, part: Tensor) -> Tensor:
        copy = self._copies.get(index)
        if copy is None or copy.shape != part.shape or copy.dtype != part.dtype:
            copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            self._copies[index] = copy
        return copy


class Background:
    """Runs one thing at a time beside the caller, who hears of its failure when it waits."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begins `work`; whatever was started before must have been waited for."""
        if self._thread is not None:
            raise ValueError("work: got a second one, expected `wait` before it")

        def run() -> None:
            try:
                work()
            except BaseException as failure:
                self._failure = failure

        # a daemon: a thread that waits for a lost rank must not keep a failed process from ending
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Returns when the work is done, or after so many seconds; raises what the work raised."""
        if self._thread is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            return
        failure, self._thread, self._failure = self._failure, None, None
        if failure is not None:
            raise failure


def _parts(name: str, value: Any) -> Iterator[tuple[MetadataIndex, Tensor]]:
    """What this rank holds of a tensor, under the indices by which checkpoints are planned."""
    if isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            yield MetadataIndex(name, shard.metadata.shard_offsets), shard.tensor
    elif isinstance(value, DTensor):
        (chunk,) = value.__create_chunk_list__()
        yield MetadataIndex(name, chunk.offsets), value.to_local()
    else:
        yield MetadataIndex(name, [0] * value.dim()), value
