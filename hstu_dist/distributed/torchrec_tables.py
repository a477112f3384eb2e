"""Tables in TorchRec's words: collections, by width, and who holds what of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingEnv,
    ShardingPlan,
    ShardMetadata,
)
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig

from hstu_dist.distributed.config import TableSpec
from hstu_dist.distributed.replicas import TableGroup
from hstu_dist.distributed.table_optimizer import sharder_of
from hstu_dist.distributed.table_plan import EmbeddingPlan, TablePlan

_DATA_TYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}


class Collections(nn.Module):
    """EmbeddingCollections with plain tensors in and out: for each table one jagged row that holds all its ids."""

    def __init__(self, specs: Mapping[str, TableSpec]) -> None:
        super().__init__()
        # TorchRec wants one width a collection
        self.tables: dict[str, list[str]] = {}
        for name, spec in specs.items():
            self.tables.setdefault(f"width_{spec.stored_width}", []).append(name)
        for collection, names in self.tables.items():
            self.add_module(collection, _collection({name: specs[name] for name in names}))

    def forward(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored rows by table, of at least the tables that are named; other names are passed over."""
        found: dict[str, Tensor] = {}
        for collection, names in self.tables.items():
            if any(name in ids for name in names):
                found |= self._look_up(collection, names, ids)
        return found

    def _look_up(self, collection: str, names: list[str], ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        nothing = next(iter(ids.values()))[:0]
        values = [ids.get(name, nothing) for name in names]
        lengths = torch.tensor([value.numel() for value in values], dtype=torch.int64, device=nothing.device)
        joined = values[0].contiguous() if len(values) == 1 else torch.cat(values)
        rows = self.get_submodule(collection)(KeyedJaggedTensor(keys=names, values=joined, lengths=lengths))
        return {name: rows[name].values() for name in names}


def _collection(specs: Mapping[str, TableSpec]) -> EmbeddingCollection:
    return EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=name,
                num_embeddings=spec.shape.num_rows,
                # padding columns: fbgemm's width rule
                embedding_dim=spec.stored_width,
                feature_names=[name],
                data_type=_DATA_TYPES[spec.config.dtype],
                # filled by us
                init_fn=_leave,
            )
            for name, spec in specs.items()
        ],
        device=torch.device("meta"),
    )


def _leave(weight: Tensor) -> Tensor:
    return weight


def place_of(rank: int, device_type: str) -> str:
    """Where a rank's part of a table is, in the words of ShardedTensor: on a GPU with its number on the machine."""
    ranks = dist.get_world_size()
    where: str = placement(device_type, rank, get_local_size(ranks) if device_type == "cuda" else ranks)
    return where


def sharded_tables(
    specs: Mapping[str, TableSpec], plan: EmbeddingPlan, device: torch.device, group: TableGroup
) -> DistributedModelParallel | None:
    """Tables on their ranks, with their optimizers fused in; None without any.

    Args:
        specs: the tables; those of a plan that are not copied.
        plan: who holds what.
        device: where rows live.
        group: the ranks that share them.
    """
    if not specs:
        return None
    collections = Collections(specs)
    parameters = {name.split(".")[-2]: parameter for name, parameter in collections.named_parameters()}
    marked = {name: (parameters[name], spec) for name, spec in specs.items()}
    sharder = sharder_of(marked, kernel="fbgemm" if device.type == "cuda" else "ours")

    def place(rank: int) -> str:
        """Of a rank of the group; TorchRec wants it among all ranks."""
        return place_of(group.first_rank + rank, device.type)

    modules = {
        collection: EmbeddingModuleShardingPlan({name: _parameter_sharding(plan.tables[name], place) for name in names})
        for collection, names in collections.tables.items()
    }
    return DistributedModelParallel(
        collections,
        env=ShardingEnv.from_process_group(group.sharing),
        device=device,
        plan=ShardingPlan(modules),
        sharders=[sharder],
        # nothing dense is inside: a data-parallel wrapper would find no parameters
        init_data_parallel=False,
    )


def forget_cached_rows(tables: nn.Module) -> None:
    """Makes kernels that keep rows in a cache (`fused_uvm_caching`) read them from the table again.

    Args:
        tables: of `sharded_tables`; changes of cached rows that were not written back are lost.
    """
    for module in tables.modules():
        if isinstance(module, ShardedEmbeddingCollection):
            for lookup in module._lookups:
                lookup.purge()


def _parameter_sharding(table: TablePlan, place: Callable[[int], str]) -> ParameterSharding:
    """A table's plan in TorchRec's words."""
    shards = [
        ShardMetadata(
            shard_sizes=[shard.rows, shard.columns],
            shard_offsets=[shard.row, shard.column],
            placement=place(shard.rank),
        )
        for shard in table.shards
    ]
    caches = table.cache_load_factor is not None
    return ParameterSharding(
        sharding_type=table.sharding,
        # never left to TorchRec: its default is the dense kernel, which on the CPU ignores unpooled mode and corrupts
        # memory
        compute_kernel=table.compute_kernel,
        ranks=[shard.rank for shard in table.shards],
        sharding_spec=EnumerableShardingSpec(shards),
        cache_params=CacheParams(load_factor=table.cache_load_factor) if caches else None,
    )
