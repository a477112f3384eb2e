"""The plan of a run's tables: from a file, from the settings, or, where these leave it open, by TorchRec's planner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, PlannerError, TopologyFactory, TrainerConfig
from torchrec.distributed.types import CacheParams, ParameterSharding

from hstu_dist.distributed.config import EmbeddingConfig, TableShape, TableSpec
from hstu_dist.distributed.table_optimizer import FBGEMM, fbgemm_arguments
from hstu_dist.distributed.table_plan import (
    EmbeddingPlan,
    TablePlan,
    TableShard,
    plan_of_settings,
    table_plan,
)
from hstu_dist.distributed.tables import EmbeddingTables, check_device
from hstu_dist.distributed.torchrec_tables import Collections
from hstu_dist.errors import UserError

IDS_PER_STEP = 10_000
"""Distinct ids that a rank looks up in each table, by which the planner weighs communication."""

_UNLIMITED = 1 << 50

_CHOICES = ("row_wise", "table_wise", "data_parallel")
"""Column-wise tables cannot keep the state of a whole row, so they are made by name only."""


def build_tables(
    config: EmbeddingConfig,
    shapes: Mapping[str, TableShape],
    device: torch.device,
    seed: int,
    memory_bytes: int | None = None,
) -> EmbeddingTables:
    """The tables of a run, planned, built and filled; all ranks call it together.

    Args:
        config: the settings.
        shapes: what the model needs, by table.
        device: where rows live.
        seed: of the initial rows.
        memory_bytes: host memory of a rank; None: not limited.

    Raises:
        UserError: no plan fits, or a table has what the device has not.
    """
    specs = config.specs(shapes)
    check_device(specs, device)
    return EmbeddingTables(specs, choose_plan(config, specs, device, memory_bytes), device, seed)


def choose_plan(
    config: EmbeddingConfig, specs: Mapping[str, TableSpec], device: torch.device, memory_bytes: int | None
) -> EmbeddingPlan:
    """The plan of all tables, the same on every rank; all ranks call it together.

    Args:
        config: the settings.
        specs: the tables.
        device: where rows live; a GPU's own memory counts in place of `memory_bytes`.
        memory_bytes: what a rank may hold; None: as much as it likes.

    Raises:
        UserError: there is none that fits, or that of the settings' file does not fit this run.
    """
    ranks = dist.get_world_size()
    plan = plan_of_settings(config, specs, ranks)
    if config.plan is not None or all(spec.config.sharding != "planner" for spec in specs.values()):
        return plan
    if device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [planned(plan, specs, device.type, memory_bytes)]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    found: EmbeddingPlan = outcome[0]
    return found


def planned(
    settled: EmbeddingPlan, specs: Mapping[str, TableSpec], device_type: str, memory_bytes: int | None
) -> EmbeddingPlan:
    """A plan in which TorchRec's planner has placed the tables that are left to it; needs no ranks.

    Args:
        settled: a plan whose other tables stay where they are.
        specs: all tables.
        device_type: cpu or cuda.
        memory_bytes: of a rank; None: as much as needed.

    Raises:
        UserError: nothing fits.
    """
    left = {name: spec for name, spec in specs.items() if spec.config.sharding == "planner"}
    others = {name: table for name, table in settled.tables.items() if name not in left}
    rest = EmbeddingPlan(world_size=settled.world_size, tables=others)
    free = (memory_bytes or _UNLIMITED) - max(rest.bytes_per_rank(specs))
    placed = _ask_planner(left, settled.world_size, device_type, free)
    tables = {name: placed.get(name, settled.tables[name]) for name in specs}
    return EmbeddingPlan(world_size=settled.world_size, tables=tables)


def _ask_planner(
    specs: Mapping[str, TableSpec], ranks: int, device_type: str, memory_bytes: int
) -> dict[str, TablePlan]:
    collections = Collections(specs)
    parameters = {name.split(".")[-2]: parameter for name, parameter in collections.named_parameters()}
    for name, spec in specs.items():
        # the planner counts the state of optimizers that are given this way only
        arguments = fbgemm_arguments(spec.optimizer)
        apply_optimizer_in_backward(FBGEMM[spec.optimizer.kind], [parameters[name]], arguments)
    on_device = device_type == "cuda"
    topology = TopologyFactory.create_topology(
        TrainerConfig(
            world_size=ranks,
            local_world_size=get_local_size(ranks) if on_device else ranks,
            hbm_cap_bytes=memory_bytes if on_device else 0,
            ddr_cap_bytes=_UNLIMITED if on_device else memory_bytes,
        ),
        kernel_config=KernelConfig(compute_device=device_type),
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=1,
        constraints={name: _constraints(spec) for name, spec in specs.items()},
        # the run's own limit already leaves room for everything else
        storage_reservation=FixedPercentageStorageReservation(0.0),
    )
    try:
        plan = planner.plan(collections, [_PlanningSharder()])
    except PlannerError as error:
        raise UserError(
            f"embedding tables {', '.join(specs)}: TorchRec's planner finds no place for them on {ranks} ranks of "
            f"{memory_bytes / 2**30:.2f} GiB",
            "use more ranks, smaller tables, dtype=fp16 or an optimizer with less state",
        ) from error
    found: dict[str, TablePlan] = {}
    for module in plan.plan.values():
        found |= {name: _table_plan(specs[name], sharding, ranks) for name, sharding in module.items()}
    return found


def _constraints(spec: TableSpec) -> ParameterConstraints:
    load_factor = spec.config.cache_load_factor
    return ParameterConstraints(
        sharding_types=list(_CHOICES),
        # dense is the kernel of data_parallel alone
        compute_kernels=[spec.config.compute_kernel, "dense"],
        pooling_factors=[float(IDS_PER_STEP)],
        cache_params=None if load_factor is None else CacheParams(load_factor=load_factor),
    )


class _PlanningSharder(EmbeddingCollectionSharder):  # type: ignore[misc]
    """Offers the planner what the tables can do, on the CPU too."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(_CHOICES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        if sharding_type == "data_parallel":
            return ["dense"]
        return ["fused", "fused_uvm", "fused_uvm_caching", "key_value"]


def _table_plan(spec: TableSpec, sharding: ParameterSharding, ranks: int) -> TablePlan:
    rows, columns = spec.shape.num_rows, spec.stored_width
    if sharding.sharding_type == "data_parallel":
        whole = (TableShard(rank=rank, row=0, column=0, rows=rows, columns=columns) for rank in range(ranks))
        return table_plan(spec, tuple(whole), "data_parallel")
    shards = [
        TableShard(
            rank=rank,
            row=shard.shard_offsets[0],
            column=shard.shard_offsets[1],
            rows=shard.shard_sizes[0],
            columns=shard.shard_sizes[1],
        )
        for shard, rank in zip(sharding.sharding_spec.shards, sharding.ranks, strict=True)
    ]
    return table_plan(spec, tuple(shards), sharding.sharding_type)
