"""All embedding tables of a run: TorchRec collections sharded over the ranks, copies of small tables, one optimizer."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.types import ShardedTensor

from hstu_dist.distributed.config import ITEM, TableSpec
from hstu_dist.distributed.replicas import table_group
from hstu_dist.distributed.replicated_table import ReplicatedTable
from hstu_dist.distributed.table_kernel import rounding_key
from hstu_dist.distributed.table_optimizer import TableOptimizer, row_update
from hstu_dist.distributed.table_plan import EmbeddingPlan
from hstu_dist.distributed.torchrec_tables import forget_cached_rows, sharded_tables
from hstu_dist.distributed.vocabulary import RowVocabulary, vocabulary_of
from hstu_dist.errors import UserError
from hstu_dist.ops.random import TokenNoise, fold

_INIT_ELEMENTS = 1 << 16
"""Filled at a time: few enough for the passes of a draw to stay in cache, which makes them five times as fast."""
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class EmbeddingTables(nn.Module):
    """Looks rows of tables up by id, wherever they live; their optimizers update them inside the backward.

    A training step begins with `optimizer.prepare` and looks up once, in all the tables that it needs: each lookup
    that is differentiated updates its rows. Each rank passes the ids that it needs, any number of them; passing each id
    once saves communication. All ranks must call it together and name the same tables.

    Attributes:
        specs: the tables.
        plan: who holds them.
        optimizer: of all tables.
        group: the ranks that the plan is made for: all, or one of several groups that each hold all tables.
        vocabularies: what turns ids into the rows that are looked up here, by table; ids of other tables are row
            numbers.
    """

    def __init__(self, specs: Mapping[str, TableSpec], plan: EmbeddingPlan, device: torch.device, seed: int) -> None:
        """Builds the tables as `plan` says and fills them, the same for a seed at any plan.

        Raises:
            UserError: a table has what this device has not.
        """
        super().__init__()
        check_device(specs, device)
        self.specs = dict(specs)
        self.plan = plan
        copies = [name for name in specs if _is_whole(plan, name, device)]
        self.group = table_group(plan.world_size, device)
        shared = {name: spec for name, spec in specs.items() if name not in copies}
        self.sharded = sharded_tables(shared, plan, device, self.group)
        self.replicated = nn.ModuleDict({name: _replicate(name, specs[name], device, seed) for name in copies})
        fused = None if self.sharded is None else self.sharded.fused_optimizer
        self.optimizer = TableOptimizer(specs, fused, dict(self._copies()))
        self._seed = seed
        self._initialise(seed)
        self.vocabularies: dict[str, RowVocabulary] = {}
        for name, spec in specs.items():
            vocabulary = vocabulary_of(spec, device, partial(self._reset, name))
            if vocabulary is not None:
                self.vocabularies[name] = vocabulary

    def forward(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows [N, width] in fp32 of each table that is named.

        Args:
            rows: their numbers by table, [N] int64.
        """
        found = {name: table(rows[name]) for name, table in self._copies() if name in rows}
        if self.sharded is not None:
            found |= self.sharded(rows)
        return {name: found[name][:, : self.specs[name].shape.width] for name in rows}

    def weights(self) -> dict[str, Any]:
        """Weights by `collection.embeddings.<table>.weight`: ShardedTensors, and of copies plain tensors.

        They are the memory itself: whoever has them may fill them, before the next look-up.
        """
        found: dict[str, Any] = {}
        if self.sharded is not None:
            # writes back what kernels have in a cache
            found = {_weight_name(name.split(".")[-2]): value for name, value in self.sharded.state_dict().items()}
            forget_cached_rows(self.sharded)
        return found | {_weight_name(name): table.rows.weight for name, table in self._copies()}

    def vocabulary_tensors(self) -> dict[str, Any]:
        """State of all vocabularies, `<table>.<name>` → plain or sharded tensor."""
        return {
            f"{table}.{name}": value
            for table, vocabulary in self.vocabularies.items()
            for name, value in vocabulary.state_tensors().items()
        }

    @torch.no_grad()
    def _reset(self, table: str, rows: Tensor) -> None:
        """Makes rows of a table, and their optimizer's state, what they were before the first step.

        Args:
            table: its name.
            rows: [N] int64, the same on every rank.
        """
        spec, weight = self.specs[table], _weight_name(table)
        for name, value in {**self.weights(), **self.optimizer.state_tensors()}.items():
            if name != weight and not name.startswith(f"{weight}."):
                continue
            for part, offsets in _parts(value):
                mine = rows[(rows >= offsets[0]) & (rows < offsets[0] + part.shape[0])]
                if name == weight:
                    first = _initial(mine, (offsets[1], part.shape[1]), spec, _key(table, self._seed))
                    part[mine - offsets[0]] = first.to(part.dtype)
                else:
                    part[mine - offsets[0]] = 0

    def _copies(self) -> list[tuple[str, ReplicatedTable]]:
        return [(name, table) for name, table in self.replicated.items() if isinstance(table, ReplicatedTable)]

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Rows that depend on seed, table and row number alone, not on who holds the row."""
        for name, weight in self.weights().items():
            table = name.split(".")[-2]
            if isinstance(weight, ShardedTensor):
                for shard in weight.local_shards():
                    row, column = shard.metadata.shard_offsets
                    _fill(shard.tensor, (row, column), self.specs[table], _key(table, seed))


def check_device(specs: Mapping[str, TableSpec], device: torch.device) -> None:
    """Whether a kind of device has everything that the tables ask for.

    Raises:
        UserError: it has not.
    """
    for name, spec in specs.items():
        lacking = spec.config.needs_cuda()
        if lacking is not None and device.type != "cuda":
            raise UserError(f"embedding table {name}: {lacking}", "use compute_kernel=fused and dtype=fp32 or fp16")
        if spec.config.compute_kernel == "key_value":
            raise UserError(
                f"embedding table {name}: compute_kernel: got key_value, whose rows no checkpoint can hold",
                "use compute_kernel=fused_uvm_caching; `python -m hstu_dist plan` counts key_value",
            )


def _is_whole(plan: EmbeddingPlan, table: str, device: torch.device) -> bool:
    """Whether our kernel alone serves a table: it is copied, or on the one rank there is."""
    return plan.tables[table].sharding == "data_parallel" or (plan.world_size == 1 and device.type == "cpu")


def _weight_name(table: str) -> str:
    # one name whatever the width, by which TorchRec groups: checkpoints of older versions have it, too
    return f"collection.embeddings.{table}.weight"


def _key(table: str, seed: int) -> int:
    return fold(seed, 1) if table == ITEM else fold(seed, 1, zlib.crc32(table.encode()))


def _replicate(name: str, spec: TableSpec, device: torch.device, seed: int) -> ReplicatedTable:
    weight = torch.empty(spec.shape.num_rows, spec.stored_width, dtype=_DTYPES[spec.config.dtype], device=device)
    _fill(weight, (0, 0), spec, _key(name, seed))
    return ReplicatedTable(weight, row_update(spec), rounding_key(name))


def _fill(part: Tensor, first: tuple[int, int], spec: TableSpec, key: int) -> None:
    """Initial values of a part of a table that begins at (row, column)."""
    row, column = first
    chunk = max(1, _INIT_ELEMENTS // part.shape[1])
    for start in range(0, part.shape[0], chunk):
        rows = part[start : start + chunk]
        numbers = torch.arange(row + start, row + start + rows.shape[0], device=rows.device)
        rows.copy_(_initial(numbers, (column, part.shape[1]), spec, key))


def _initial(rows: Tensor, columns: tuple[int, int], spec: TableSpec, key: int) -> Tensor:
    """Initial values [N, count] fp32 of rows [N] of a table, in the columns (first, count)."""
    first, count = columns
    noise = TokenNoise(key, rows)
    last = first + count
    drawn = noise.truncated_normal(last) if spec.config.initialiser == "truncated_normal" else noise.uniform(last)
    return drawn[:, first:].mul_(spec.config.init_std)


def _parts(value: Any) -> Iterator[tuple[Tensor, list[int]]]:
    """What this rank holds of a tensor, and where in the whole it begins."""
    if isinstance(value, ShardedTensor):
        yield from ((shard.tensor, shard.metadata.shard_offsets) for shard in value.local_shards())
    else:
        yield value, [0] * value.dim()
