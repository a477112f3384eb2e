"""Who holds which part of which table: made from the settings, kept as JSON, checked against a run; no torch.

TorchRec's planner makes the same plans in `distributed/planner.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hstu_dist.distributed.config import EmbeddingConfig, TableSpec, stored_width
from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically
from hstu_dist.validation import STRICT, as_user_error

PLAN_FILE = "embedding_plan.json"
"""Name of a plan in the folder of a run."""

_MAKE_ANEW = "set embedding.plan=null to plan anew"
_COLUMNS = 4
"""fbgemm's rows, and so the parts of a row, are multiples of four elements."""

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TableShard:
    """The part of a table that one rank holds: `rows` x `columns` elements from (`row`, `column`) on; may be empty."""

    rank: Count
    row: Count
    column: Count
    rows: Count
    columns: Count


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TablePlan:
    """Where a table lives.

    Attributes:
        rows, width: of the table, without padding.
        dtype: of the stored rows.
        sharding: how it is split.
        compute_kernel: memory it lives in.
        cache_load_factor: share of rows in the cache of fused_uvm_caching.
        shards: who holds which part; of data_parallel, every rank all of it.
    """

    rows: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]
    dtype: Literal["fp32", "fp16", "bf16"]
    sharding: Literal["row_wise", "table_wise", "column_wise", "data_parallel"]
    compute_kernel: Literal["fused", "fused_uvm", "fused_uvm_caching", "key_value"]
    cache_load_factor: float | None
    shards: tuple[TableShard, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EmbeddingPlan:
    """Where all tables of a run live on `world_size` ranks."""

    world_size: Annotated[int, Field(gt=0)]
    tables: dict[str, TablePlan]

    def bytes_per_rank(self, specs: Mapping[str, TableSpec]) -> list[int]:
        """Weights, optimizer state and vocabulary that each rank holds, in whatever memory.

        Args:
            specs: the tables that were planned.
        """
        held = [0] * self.world_size
        for name, plan in self.tables.items():
            for shard in plan.shards:
                spec, part = specs[name], (shard.rows, shard.columns)
                held[shard.rank] += spec.weight_bytes(*part) + spec.state_bytes(*part)
            held = [size + specs[name].vocabulary_bytes(self.world_size) for size in held]
        return held

    def save(self, path: Path) -> None:
        """Writes the JSON that `load_plan` reads."""
        write_atomically(path, (json.dumps(asdict(self), indent=1) + "\n").encode())


def configured_plan(specs: Mapping[str, TableSpec], world_size: int) -> EmbeddingPlan:
    """The plan that the settings name; where they leave it to the planner, rows are split.

    Raises:
        UserError: the columns of a table cannot be split over so many ranks.
    """
    shards: dict[str, tuple[TableShard, ...]] = {}
    load = [0] * world_size
    # whole tables last, the largest first, each to the rank that has least
    by_size = sorted(specs, key=lambda name: -specs[name].weight_bytes(specs[name].shape.num_rows, 1))
    for name in sorted(by_size, key=lambda name: specs[name].config.sharding == "table_wise"):
        spec = specs[name]
        shards[name] = tuple(_split(name, spec, world_size, load.index(min(load))))
        for shard in shards[name]:
            load[shard.rank] += spec.weight_bytes(shard.rows, shard.columns)
    return EmbeddingPlan(world_size=world_size, tables={name: table_plan(specs[name], shards[name]) for name in specs})


def table_plan(spec: TableSpec, shards: tuple[TableShard, ...], sharding: str | None = None) -> TablePlan:
    """The plan of a table whose shards are decided; `sharding` is what a planner chose."""
    config = spec.config
    chosen = sharding or ("row_wise" if config.sharding == "planner" else config.sharding)
    return TablePlan(
        rows=spec.shape.num_rows,
        width=spec.shape.width,
        dtype=config.dtype,
        sharding=chosen,  # type: ignore[arg-type]
        compute_kernel=config.compute_kernel,
        cache_load_factor=config.cache_load_factor,
        shards=shards,
    )


def load_plan(path: Path) -> EmbeddingPlan:
    """A plan that `save` wrote.

    Raises:
        UserError: the file is missing or holds no plan.
    """
    try:
        values = json.loads(path.read_bytes())
        return TypeAdapter(EmbeddingPlan).validate_python(values)
    except ValidationError as error:
        raise as_user_error(error, f"embedding.plan {path}", values if isinstance(values, dict) else {}) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no JSON"
        raise UserError(f"embedding.plan {path}: cannot be read ({reason})", _MAKE_ANEW) from error


def plan_of_settings(config: EmbeddingConfig, specs: Mapping[str, TableSpec], world_size: int) -> EmbeddingPlan:
    """The plan of the file that the settings name, checked, or else of the settings themselves.

    Raises:
        UserError: the file's plan does not fit these tables or ranks; or as `configured_plan`.
    """
    if config.plan is None:
        return configured_plan(specs, world_size)
    plan = load_plan(Path(config.plan))
    for problem in _misfits(plan, specs, world_size):
        raise UserError(f"embedding.plan {config.plan}: {problem}", _MAKE_ANEW)
    return plan


def _split(name: str, spec: TableSpec, ranks: int, emptiest: int) -> Iterator[TableShard]:
    rows, columns = spec.shape.num_rows, spec.stored_width
    match spec.config.sharding:
        case "table_wise":
            yield TableShard(rank=emptiest, row=0, column=0, rows=rows, columns=columns)
        case "data_parallel":
            yield from (TableShard(rank=rank, row=0, column=0, rows=rows, columns=columns) for rank in range(ranks))
        case "column_wise":
            if columns % (_COLUMNS * ranks):
                raise UserError(
                    f"embedding table {name}: column_wise cannot split width {spec.shape.width} over {ranks} ranks",
                    f"use a width that is a multiple of {_COLUMNS * ranks}, or sharding=row_wise",
                )
            part = columns // ranks
            yield from (TableShard(rank=r, row=0, column=r * part, rows=rows, columns=part) for r in range(ranks))
        case _:
            yield from row_shards(rows, columns, ranks)


def row_shards(rows: int, columns: int, ranks: int) -> Iterator[TableShard]:
    """Equal blocks of rows as TorchRec cuts them; the last ranks may have fewer, or none."""
    block = -(-rows // ranks)
    for rank in range(ranks):
        first = min(rank * block, rows)
        yield TableShard(rank=rank, row=first, column=0, rows=min(block, rows - first), columns=columns)


def _misfits(plan: EmbeddingPlan, specs: Mapping[str, TableSpec], world_size: int) -> Iterator[str]:
    """What a plan from a file has that this run has not."""
    if plan.world_size != world_size:
        yield f"made for {plan.world_size} ranks, this run has {world_size}"
    if plan.tables.keys() != specs.keys():
        yield f"made for tables {', '.join(sorted(plan.tables))}, this run has {', '.join(sorted(specs))}"
        return
    for name, table in plan.tables.items():
        spec = specs[name]
        wanted: dict[str, Any] = {
            "rows": spec.shape.num_rows,
            "width": spec.shape.width,
            "dtype": spec.config.dtype,
            "compute_kernel": spec.config.compute_kernel,
            "cache_load_factor": spec.config.cache_load_factor,
        }
        for key, value in wanted.items():
            if getattr(table, key) != value:
                yield f"{name}.{key}: got {getattr(table, key)}, expected {value}"
        if table.sharding == "column_wise" and spec.optimizer.kind.startswith("rowwise"):
            yield f"{name}.sharding: got column_wise, expected another with {spec.optimizer.kind}"
        if not _covers(table, world_size):
            yield f"{name}.shards: got no {table.sharding} split of {table.rows} x {stored_width(table.width)} elements"


def _covers(table: TablePlan, ranks: int) -> bool:
    """Whether the shards are ones that TorchRec can look up: the whole table once, a shard a rank, in order."""
    rows, columns = table.rows, stored_width(table.width)
    shards = table.shards
    match table.sharding:
        case "row_wise":
            return shards == tuple(row_shards(rows, columns, ranks))
        case "table_wise":
            return len(shards) == 1 and _whole(shards[0], rows, columns) and shards[0].rank < ranks
        case "data_parallel":
            return [s.rank for s in shards] == list(range(ranks)) and all(_whole(s, rows, columns) for s in shards)
        case _:
            part = shards[0].columns if shards else 0
            ordered = [(s.row, s.column, s.rows, s.columns) for s in shards]
            ranks_used = [s.rank for s in shards]
            return (
                ordered == [(0, i * part, rows, part) for i in range(len(shards))]
                and part % _COLUMNS == 0
                and part * len(shards) == columns
                and ranks_used == sorted(set(ranks_used))
                and max(ranks_used) < ranks
            )


def _whole(shard: TableShard, rows: int, columns: int) -> bool:
    return (shard.row, shard.column, shard.rows, shard.columns) == (0, 0, rows, columns)
