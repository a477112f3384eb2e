"""An embedding kernel for TorchRec in plain PyTorch: its sharding and communication, our row updates.

fbgemm's kernels have no AdamW on the CPU. TorchRec asks a sharded collection for lookups and a lookup for kernels;
`RowSharder` answers both with the classes below, and everything else stays TorchRec's. TorchRec has no types: its
classes are Any, which mypy does not want as bases.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata
from torchrec import EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_kernel import BaseEmbedding, get_state_dict
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.types import ParameterSharding, ShardedTensor, ShardingEnv
from torchrec.optim.fused import FusedOptimizer, FusedOptimizerModule

from hstu_dist.distributed.row_update import Moment, RowRule, update_rows

_RULE = "row_rule"
"""Key of TorchRec's `fused_params`, which carry kernel arguments from a sharder to its kernels."""


class RowSharder(EmbeddingCollectionSharder):  # type: ignore[misc]
    """Shards EmbeddingCollections of one table whose rows are updated by `rule` inside the backward."""

    def __init__(self, rule: RowRule) -> None:
        super().__init__(fused_params={_RULE: rule})

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingCollection:
        """The collection with its rows on the ranks that `params` names."""
        return _Collection(module, params, env, self.fused_params, device, module_fqn=module_fqn)


class _Collection(ShardedEmbeddingCollection):  # type: ignore[misc]
    def _create_lookups(self) -> None:
        for sharding in self._sharding_type_to_sharding.values():
            self._lookups.append(_Lookup(sharding._grouped_embedding_configs, sharding._pg, self._device))


class _Lookup(GroupedEmbeddingsLookup):  # type: ignore[misc]
    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup | None,
        device: torch.device | None,
        env: ShardingEnv | None = None,
    ) -> BaseEmbedding:
        return RowKernel(config, pg)


class RowKernel(BaseEmbedding, FusedOptimizerModule):  # type: ignore[misc]
    """One rank's rows of a table, with the state of their optimizer; on the CPU, in fp32."""

    def __init__(self, config: GroupedEmbeddingConfig, pg: dist.ProcessGroup | None) -> None:
        super().__init__()
        assert config.fused_params is not None
        (self._table,) = config.embedding_tables
        self._config = config
        self._pg = pg
        self.rule: RowRule = config.fused_params[_RULE]
        # TorchRec initialises tables itself, through the parameter below
        self.weight = torch.empty(self._table.local_rows, self._table.local_cols)
        self.state = self.rule.new_state(self.weight)
        self._optimizer = RowOptimizer(self, pg)
        # autograd needs an input that requires a gradient; the weights must not, they are updated in the backward
        self._handle = torch.empty(0, requires_grad=True)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Rows [N, D] of this rank's ids."""
        rows: Tensor = _LookupRows.apply(self._handle, features.values(), self)  # type: ignore[no-untyped-call]
        return rows

    def update(self, ids_N: Tensor, gradient_ND: Tensor) -> None:
        """Applies the gradient of a lookup."""
        update_rows(self.rule, self.weight, self.state, (ids_N, gradient_ND), self._optimizer.moment)

    @property
    def config(self) -> GroupedEmbeddingConfig:
        """The table, as TorchRec hands it to a kernel."""
        return self._config

    @property
    def table(self) -> ShardedEmbeddingTable:
        """What this rank holds of the table, and who holds the rest."""
        return self._table

    @property
    def fused_optimizer(self) -> RowOptimizer:
        """What TorchRec collects from all kernels."""
        return self._optimizer

    def flush(self) -> None:
        """There is no cache in front of the weights."""

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The weights as a ShardedTensor."""
        found: dict[str, Any] = get_state_dict([self._table], [self.weight], self._pg, destination, prefix)
        return found

    def named_parameters_by_table(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights under the name that TorchRec registers them by."""
        parameter = nn.Parameter(self.weight)
        # tells TorchRec and its users to leave the parameter to this optimizer
        parameter._in_backward_optimizers = [self._optimizer]  # type: ignore[attr-defined]
        yield self._table.name, parameter


class _LookupRows(torch.autograd.Function):
    """Gathers rows; its backward updates them and returns no gradient."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, ids_N: Tensor, kernel: RowKernel) -> Tensor:
        ctx.save_for_backward(ids_N)
        ctx.kernel = kernel
        return kernel.weight.index_select(0, ids_N)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[None, None, None]:
        (ids_N,) = ctx.saved_tensors
        ctx.kernel.update(ids_N, gradient_ND)
        return None, None, None


class RowOptimizer(FusedOptimizer):  # type: ignore[misc]
    """Shows weights and state of a kernel as ShardedTensors, and takes the learning rate and number of a step."""

    def __init__(self, kernel: RowKernel, pg: dist.ProcessGroup | None) -> None:
        table = kernel.table
        weight = _sharded(kernel.weight, table, pg)
        state = {f"{table.name}.{name}": _sharded(value, table, pg) for name, value in kernel.state.items()}
        self.moment = Moment(learning_rate=0.0, step=1)
        super().__init__({f"{table.name}.weight": weight}, {weight: state}, [{"params": [weight], "lr": 0.0}])

    def step(self, closure: Any = None) -> None:
        """Takes the learning rate from the parameter group."""
        (group,) = self.param_groups
        self.moment = Moment(learning_rate=group["lr"], step=self.moment.step)

    def set_optimizer_step(self, step: int) -> None:
        """Takes the number, from 1, of the step whose backward comes next."""
        self.moment = Moment(learning_rate=self.moment.learning_rate, step=step)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """There is no gradient to clear."""


def _sharded(local: Tensor, table: ShardedEmbeddingTable, pg: dist.ProcessGroup | None) -> ShardedTensor:
    """A rank's part [rows, D] or [rows] of a tensor that is laid out over the ranks as the table is."""
    everywhere, here = table.global_metadata, table.local_metadata
    assert everywhere is not None
    assert here is not None
    dims = local.dim()

    def cut(shard: ShardMetadata) -> ShardMetadata:
        return ShardMetadata(shard.shard_offsets[:dims], shard.shard_sizes[:dims], shard.placement)

    metadata = ShardedTensorMetadata(
        shards_metadata=[cut(shard) for shard in everywhere.shards_metadata],
        size=torch.Size(everywhere.size[:dims]),
        tensor_properties=TensorProperties(dtype=local.dtype),
    )
    return ShardedTensor._init_from_local_shards_and_global_metadata([Shard(local, cut(here))], metadata, pg)
