"""How the ranks share the tower: a copy each (DDP), a part of each tensor (FSDP2), or copies in groups (hybrid)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from hstu_dist.distributed.config import ParallelConfig


class ParallelTower:
    """Calls a tower on this rank's sequences; its backward averages the gradients over all ranks.

    Sharded, the tower itself changes: its parameters become DTensors, of which a rank holds the rows that are its
    own, and every call gathers the layers one after the other. All ranks must then call it equally often, with
    gradients or without; a rank without sequences calls it on none.
    """

    def __init__(self, tower: nn.Module, config: ParallelConfig) -> None:
        """Splits or copies `tower`, whose parameters are alike on all ranks.

        Args:
            tower: changed in place if it is sharded.
            config: fits the number of ranks, as `preflight` has checked.
        """
        self._sharded: FSDPModule | None = None
        self._copied: DistributedDataParallel | None = None
        self._call: nn.Module = tower
        if config.kind != "ddp":
            self._sharded = _shard(tower, config)
        elif dist.get_world_size() > 1:
            self._call = self._copied = DistributedDataParallel(tower, gradient_as_bucket_view=True)

    def __call__(self, *inputs: Any) -> Tensor:
        """As the tower."""
        vectors: Tensor = self._call(*inputs)
        return vectors

    def exchanging(self, wanted: bool) -> AbstractContextManager[None]:
        """Around one forward and its backward: whether this backward adds the gradients of all ranks up.

        Without it a rank keeps adding to gradients of its own, whole ones even where the tower is sharded.
        """
        if self._sharded is not None:
            self._sharded.set_requires_gradient_sync(wanted)
        if self._copied is not None and not wanted:
            copied: AbstractContextManager[None] = self._copied.no_sync()
            return copied
        return nullcontext()


def _shard(tower: nn.Module, config: ParallelConfig) -> FSDPModule:
    mesh = _mesh(next(tower.parameters()).device.type, config.shard_ranks)
    encoder = getattr(tower, "encoder", None)
    for layer in [] if encoder is None else encoder.get_submodule("layers").children():
        # gathered when its turn comes and freed after it, forward and backward
        fully_shard(layer, mesh=mesh)
    return fully_shard(tower, mesh=mesh)


def _mesh(device_type: str, shard_ranks: int | None) -> DeviceMesh:
    """All ranks in a row, or neighbours that share a copy by groups that each hold one."""
    ranks = dist.get_world_size()
    if shard_ranks is None:
        return init_device_mesh(device_type, (ranks,), mesh_dim_names=("shard",))
    shape = (ranks // shard_ranks, shard_ranks)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
