"""The item table: a TorchRec EmbeddingCollection, sharded over the ranks, with its optimizer fused in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ModuleSharder, ShardedTensor, ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingConfig as TableConfig

from hstu_dist.distributed.config import EmbeddingConfig, stored_width
from hstu_dist.distributed.table_optimizer import TableOptimizer, sharder_of
from hstu_dist.ops.random import TokenNoise, fold

_FEATURE = "item"
_INIT_CHUNK = 1 << 16


@dataclass(frozen=True)
class TableShape:
    """Rows and width of a table."""

    num_rows: int
    width: int


class ItemTable(nn.Module):
    """Looks rows up by id, wherever they live; the optimizer updates them inside the backward.

    A training step begins with `optimizer.prepare` and looks up once: each lookup that is differentiated updates
    its rows. Each rank passes the ids that it needs, any number of them; passing each id once saves communication.
    All ranks must call it together.
    """

    def __init__(self, shape: TableShape, config: EmbeddingConfig, device: torch.device, seed: int) -> None:
        super().__init__()
        self.shape = shape
        collection = EmbeddingCollection(
            tables=[
                TableConfig(
                    name=_FEATURE,
                    num_embeddings=shape.num_rows,
                    # padding columns: fbgemm's width rule
                    embedding_dim=stored_width(shape.width),
                    feature_names=[_FEATURE],
                )
            ],
            device=torch.device("meta"),
        )
        sharder = sharder_of(collection, config.optimizer, shape.width, device)
        self.sharded = DistributedModelParallel(
            _Lookup(collection),
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=device,
            plan=_plan(collection, config, device, sharder),
            sharders=[sharder],
            # nothing dense is inside: a data-parallel wrapper would find no parameters
            init_data_parallel=False,
        )
        self.optimizer = TableOptimizer(config.optimizer, self.sharded.fused_optimizer)
        self._initialise(config.init_std, seed)

    def forward(self, ids_U: Tensor) -> Tensor:
        """Rows [U, width] of ids [U] int64."""
        rows: Tensor = self.sharded(ids_U)
        return rows[:, : self.shape.width]

    def describe(self) -> str:
        """The sharding plan as a table."""
        return str(self.sharded.plan)

    @torch.no_grad()
    def _initialise(self, std: float, seed: int) -> None:
        """Truncated normal rows that depend on seed and row id alone, not on who holds the row."""
        for weight in self.sharded.state_dict().values():
            assert isinstance(weight, ShardedTensor)
            for shard in weight.local_shards():
                first = shard.metadata.shard_offsets[0]
                for start in range(0, shard.tensor.shape[0], _INIT_CHUNK):
                    rows = shard.tensor[start : start + _INIT_CHUNK]
                    ids = torch.arange(first + start, first + start + rows.shape[0], device=rows.device)
                    rows.copy_(TokenNoise(fold(seed, 1), ids).truncated_normal(rows.shape[1]).mul_(std))


class _Lookup(nn.Module):
    """EmbeddingCollection with plain tensors in and out: one jagged row that holds all ids."""

    def __init__(self, collection: EmbeddingCollection) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, ids_U: Tensor) -> Tensor:
        lengths = torch.tensor([ids_U.numel()], dtype=torch.int64, device=ids_U.device)
        features = KeyedJaggedTensor(keys=[_FEATURE], values=ids_U.contiguous(), lengths=lengths)
        rows: Tensor = self.collection(features)[_FEATURE].values()
        return rows


def _plan(
    collection: EmbeddingCollection, config: EmbeddingConfig, device: torch.device, sharder: ModuleSharder[nn.Module]
) -> ShardingPlan:
    # always the fused kernel: on CPU the dense one ignores unpooled mode and corrupts memory
    kernel = "fused"
    per_table = (
        row_wise(compute_kernel=kernel) if config.sharding == "row_wise" else table_wise(rank=0, compute_kernel=kernel)
    )
    world_size = dist.get_world_size()
    module_plan = construct_module_sharding_plan(
        collection,
        {_FEATURE: per_table},
        sharder=sharder,
        world_size=world_size,
        local_size=world_size,
        device_type=device.type,
    )
    return ShardingPlan({"collection": module_plan})
