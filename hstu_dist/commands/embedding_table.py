"""The plan of the embedding tables, as text for the start of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from hstu_dist.distributed.config import TableSpec
from hstu_dist.distributed.table_plan import EmbeddingPlan, TablePlan


def embedding_table(specs: Mapping[str, TableSpec], plan: EmbeddingPlan) -> str:
    """One line a table: what it is, where it lives and what its parts weigh with their optimizer's state."""
    table = Table(title=f"embedding tables on {plan.world_size} ranks", title_justify="left")
    for name in ("table", "dtype", "sharding", "kernel", "optimizer", "ranks"):
        table.add_column(name)
    for name in ("rows", "width", "MiB", "on the fullest rank"):
        table.add_column(name, justify="right")
    for name, spec in specs.items():
        placed = plan.tables[name]
        alone = EmbeddingPlan(world_size=plan.world_size, tables={name: placed}).bytes_per_rank(specs)
        table.add_row(
            *(name, placed.dtype, placed.sharding, placed.compute_kernel, spec.optimizer.kind, _ranks(placed)),
            *(f"{placed.rows:,}", str(placed.width), _mib(sum(alone)), _mib(max(alone))),
        )
    text = io.StringIO()
    # a fixed width: the table also goes into files
    Console(file=text, width=120).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _ranks(plan: TablePlan) -> str:
    """Ranks that hold something, as ranges."""
    holders = [shard.rank for shard in plan.shards if shard.rows]
    runs: list[list[int]] = []
    for rank in holders:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
