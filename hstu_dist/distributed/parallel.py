"""How the ranks share the tower: a copy each (DDP), a part of each tensor (FSDP2), or copies in groups (hybrid)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from hstu_dist.distributed.config import ParallelConfig
from hstu_dist.errors import UserError
from hstu_dist.machine import Precision


@dataclass(frozen=True, kw_only=True)
class DenseSettings:
    """How the tower is shared and computed.

    Attributes:
        parallel: how the ranks share it; fits their number, as `preflight` has checked.
        precision: of its matrix products; `claim_precision` has prepared the process for it.
    """

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Precision = "float32"


class ParallelTower:
    """Calls a tower on this rank's sequences; its backward averages the gradients over all ranks.

    Sharded, the tower itself changes: its parameters become DTensors, of which a rank holds the rows that are its
    own, and every call gathers the layers one after the other. All ranks must then call it equally often, with
    gradients or without; a rank without sequences calls it on none.
    """

    def __init__(self, tower: nn.Module, settings: DenseSettings) -> None:
        """Splits or copies `tower`, whose parameters are alike on all ranks; changed in place if it is split."""
        self._sharded: FSDPModule | None = None
        self._copied: DistributedDataParallel | None = None
        self._dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
        self._local: nn.Module = tower
        if settings.parallel.kind != "ddp":
            self._sharded = _shard(tower, settings)
            return
        if settings.precision == "bfloat16":
            self._local = _InBfloat16(tower)
        if dist.get_world_size() > 1:
            self._copied = DistributedDataParallel(self._local, gradient_as_bucket_view=True)

    def __call__(self, items_TD: Tensor, *rest: Any) -> Tensor:
        """As the tower; the result is in float32 at any precision."""
        vectors: Tensor = (self._copied or self._local)(items_TD.to(self._dtype), *rest)
        return vectors

    def local(self, items_TD: Tensor, *rest: Any) -> Tensor:
        """The same for evaluation: copies do not speak to each other, and a layer of the user's own drops nothing."""
        training = [module for module in self._local.modules() if module.training]
        self._local.eval()
        try:
            vectors: Tensor = self._local(items_TD.to(self._dtype), *rest)
        finally:
            for module in training:
                module.training = True
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


class _InBfloat16(nn.Module):
    """Calls a tower with its parameters rounded to bfloat16; their gradients arrive, and are added up, in float32."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, items_TD: Tensor, *rest: Any) -> Tensor:
        rounded = {name: parameter.to(torch.bfloat16) for name, parameter in self.tower.named_parameters()}
        vectors: Tensor = functional_call(self.tower, rounded, (items_TD, *rest))
        return vectors


def _shard(tower: nn.Module, settings: DenseSettings) -> FSDPModule:
    mesh = _mesh(next(tower.parameters()).device.type, settings.parallel.shard_ranks)
    rounded = torch.bfloat16 if settings.precision == "bfloat16" else None
    # inputs arrive in the right dtype, and a context cannot be taken apart
    policy = MixedPrecisionPolicy(param_dtype=rounded, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in _layers(tower):
        # gathered when its turn comes and freed after it, forward and backward
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # freed as well: what an evaluation gathered may be other weights, such as averages, than those trained next
    return fully_shard(tower, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _layers(tower: nn.Module) -> Iterator[nn.Module]:
    encoder = getattr(tower, "encoder", None)
    if encoder is None:
        return iter(())
    layers = getattr(encoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(
            f"trainer.parallel.kind: got fsdp or hsdp, but {type(encoder).__name__} has no layers to split",
            "give the encoder a torch.nn.ModuleList named layers, or use kind=ddp",
        )
    return layers.children()


def _mesh(device_type: str, shard_ranks: int | None) -> DeviceMesh:
    """All ranks in a row, or neighbours that share a copy by groups that each hold one."""
    ranks = dist.get_world_size()
    if shard_ranks is None:
        return init_device_mesh(device_type, (ranks,), mesh_dim_names=("shard",))
    shape = (ranks // shard_ranks, shard_ranks)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
