"""Groups of ranks that each hold a full set of tables: they train apart, and average what they hold from time to time.

TorchRec calls this 2-D parallelism. Its own `DMPCollection` refuses CPUs and averages what fbgemm's kernels hold; what
is needed of it is small: a group of processes to shard over, and one to average over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import init_device_mesh

from hstu_dist.distributed.row_update import stochastic_round

_CHUNK_ELEMENTS = 1 << 22
"""Elements averaged at a time: shorter ones than fp32 are added up in a copy."""


@dataclass(frozen=True)
class TableGroup:
    """The ranks around this one.

    Attributes:
        sharing: consecutive ranks that hold one set of tables together.
        first_rank: of those.
        replicas: the ranks that hold the same part of each set; None: there is one set.
    """

    sharing: dist.ProcessGroup
    first_rank: int = 0
    replicas: dist.ProcessGroup | None = None

    @torch.no_grad()
    def average(self, tensors: Mapping[str, Any]) -> None:
        """Makes all sets the mean of them: weights, and state of optimizers alike; all ranks call it together.

        Args:
            tensors: sharded ones are changed in place; others, which all ranks hold, are alike anyway.
        """
        if self.replicas is None:
            return
        for value in tensors.values():
            if isinstance(value, ShardedTensor):
                for shard in value.local_shards():
                    self._average(shard.tensor)

    def _average(self, part: Tensor) -> None:
        for chunk in part.view(-1).split(_CHUNK_ELEMENTS):
            total = chunk.float()
            dist.all_reduce(total, group=self.replicas)
            total.div_(dist.get_world_size(self.replicas))
            # to the nearest, a step that one set took alone would be undone every time
            chunk.copy_(total if chunk.dtype == torch.float32 else _rounded_alike(total, chunk.dtype))


def _rounded_alike(mean_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded at random, the same wherever the mean is the same: it is what the numbers are drawn from."""
    key = int(mean_N.view(torch.int32).sum())
    generator = torch.Generator(mean_N.device).manual_seed(key)
    words_N = torch.randint(
        -(1 << 31), 1 << 31, mean_N.shape, dtype=torch.int32, device=mean_N.device, generator=generator
    )
    return stochastic_round(mean_N, dtype, words_N)


def table_group(ranks: int, device: torch.device) -> TableGroup:
    """The groups where every `ranks` neighbours hold a set of tables; all ranks call it together."""
    everyone = dist.get_world_size()
    if ranks == everyone:
        world = dist.group.WORLD
        assert world is not None
        return TableGroup(world)
    mesh = init_device_mesh(device.type, (everyone // ranks, ranks), mesh_dim_names=("replica", "table"))
    first = dist.get_rank() // ranks * ranks
    return TableGroup(mesh.get_group("table"), first, mesh.get_group("replica"))
