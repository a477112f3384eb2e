"""An embedding kernel for TorchRec in plain PyTorch: its sharding and communication, our row updates.

fbgemm's kernels have no AdamW on the CPU. TorchRec asks a sharded collection for lookups and a lookup for kernels;
`RowSharder` answers both with the classes below, and everything else stays TorchRec's. TorchRec has no types: its
classes are Any, which mypy does not want as bases.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.fused import FusedOptimizer, FusedOptimizerModule

from hstu_dist.distributed.row_update import Moment, RowRule, Rows, update_rows
from hstu_dist.ops.random import fold

_RULE, _LEARNING_RATE = "row_rule", "learning_rate"
"""Keys of TorchRec's `fused_params`, which carry arguments from a table's parameter to its kernel."""

_DTYPES = {DataType.FP32: torch.float32, DataType.FP16: torch.float16}
_ROUNDING = 2


@dataclass(frozen=True)
class RowUpdate:
    """How our kernel updates the rows of a table.

    Attributes:
        rule: the optimizer.
        learning_rate: before the schedule.
    """

    rule: RowRule
    learning_rate: float


def update_in_backward(parameter: nn.Parameter, update: RowUpdate) -> None:
    """Marks the parameter of a table that `RowSharder` is going to shard.

    TorchRec keeps tables whose marks are equal in one kernel.
    """
    # what torch's own `_apply_optimizer_in_backward` sets, but for the class of an optimizer
    parameter._optimizer_classes = [None]  # type: ignore[attr-defined]
    parameter._optimizer_kwargs = [  # type: ignore[attr-defined]
        {_RULE: update.rule, _LEARNING_RATE: update.learning_rate}
    ]


class RowSharder(EmbeddingCollectionSharder):  # type: ignore[misc]
    """Shards EmbeddingCollections whose rows are updated inside the backward, as their parameters are marked."""

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
    """One rank's parts of some tables of one dtype, with the state of their optimizer; on the CPU."""

    def __init__(self, config: GroupedEmbeddingConfig, pg: dist.ProcessGroup | None) -> None:
        super().__init__()
        assert config.fused_params is not None
        self._config = config
        self._pg = pg
        self.rule: RowRule = config.fused_params[_RULE]
        # TorchRec initialises tables itself, through the parameters below
        self.parts = [_empty(table, self.rule, _DTYPES[config.data_type]) for table in config.embedding_tables]
        self._optimizer = RowOptimizer(self, config.fused_params[_LEARNING_RATE], pg)
        # autograd needs an input that requires a gradient; the weights must not, they are updated in the backward
        self._handle = torch.empty(0, requires_grad=True)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Rows [N, D] in fp32 of this rank's ids, one table after the other."""
        ids_N = features.values()
        if len(self.parts) == 1:
            return look_up(self._handle, ids_N, self.parts[0], self._update)
        ends, first, found = features.offset_per_key(), 0, []
        for table, part in zip(self.tables, self.parts, strict=True):
            last = first + table.num_features()
            found.append(look_up(self._handle, ids_N[ends[first] : ends[last]], part, self._update))
            first = last
        return torch.cat(found)

    def _update(self, part: Rows, lookup: tuple[Tensor, Tensor]) -> None:
        update_rows(self.rule, part, lookup, self._optimizer.moment)

    @property
    def config(self) -> GroupedEmbeddingConfig:
        """The tables, as TorchRec hands them to a kernel."""
        return self._config

    @property
    def tables(self) -> list[ShardedEmbeddingTable]:
        """What this rank holds of each table, and who holds the rest."""
        found: list[ShardedEmbeddingTable] = self._config.embedding_tables
        return found

    @property
    def fused_optimizer(self) -> RowOptimizer:
        """What TorchRec collects from all kernels."""
        return self._optimizer

    def flush(self) -> None:
        """There is no cache in front of the weights."""

    def purge(self) -> None:
        """Nor anything to forget in one."""

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The weights as ShardedTensors."""
        weights = [part.weight for part in self.parts]
        found: dict[str, Any] = get_state_dict(self.tables, weights, self._pg, destination, prefix)
        return found

    def named_parameters_by_table(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights under the names that TorchRec registers them by."""
        for table, part in zip(self.tables, self.parts, strict=True):
            parameter = nn.Parameter(part.weight)
            # tells TorchRec and its users to leave the parameter to this optimizer
            parameter._in_backward_optimizers = [self._optimizer]  # type: ignore[attr-defined]
            yield table.name, parameter


def rounding_key(table: str) -> int:
    """Key of the random numbers by which a table's updates are rounded; equal on all ranks."""
    return fold(_ROUNDING, zlib.crc32(table.encode()))


def _empty(table: ShardedEmbeddingTable, rule: RowRule, dtype: torch.dtype) -> Rows:
    weight = torch.empty(table.local_rows, table.local_cols, dtype=dtype)
    assert table.local_metadata is not None
    row, column = table.local_metadata.shard_offsets
    return Rows(weight, rule.new_state(weight), rounding_key(table.name), (row, column))


def look_up(handle: Tensor, ids_N: Tensor, part: Rows, update: Callable[[Rows, tuple[Tensor, Tensor]], None]) -> Tensor:
    """Rows [N, D] in fp32.

    Args:
        handle: an empty tensor that requires a gradient.
        ids_N: int64, counted from the first row of `part`.
        part: where to look.
        update: called in the backward as `update(part, (ids_N, gradient_ND))`.
    """
    rows: Tensor = _LookupRows.apply(handle, ids_N, part, update)  # type: ignore[no-untyped-call]
    return rows


class _LookupRows(torch.autograd.Function):
    """Gathers rows; its backward updates them and returns no gradient."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, ids_N: Tensor, part: Rows, update: Any) -> Tensor:
        ctx.save_for_backward(ids_N)
        ctx.part, ctx.update = part, update
        return part.weight.index_select(0, ids_N).float()

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[None, None, None, None]:
        (ids_N,) = ctx.saved_tensors
        ctx.update(ctx.part, (ids_N, gradient_ND))
        return None, None, None, None


class RowOptimizer(FusedOptimizer):  # type: ignore[misc]
    """Shows weights and state of a kernel as ShardedTensors, and takes the learning rate and number of a step."""

    def __init__(self, kernel: RowKernel, learning_rate: float, pg: dist.ProcessGroup | None) -> None:
        weights, state = {}, {}
        for table, part in zip(kernel.tables, kernel.parts, strict=True):
            weight = _sharded(part.weight, table, pg)
            weights[f"{table.name}.weight"] = weight
            state[weight] = {f"{table.name}.{name}": _sharded(value, table, pg) for name, value in part.state.items()}
        self.moment = Moment(learning_rate=0.0, step=1)
        super().__init__(weights, state, [{"params": list(weights.values()), "lr": learning_rate}])

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
