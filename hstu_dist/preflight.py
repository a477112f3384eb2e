"""What can be refused before any rank starts: missing data, a plan that does not fit, a bad run folder; no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hstu_dist.actions import action_fields
from hstu_dist.config import RunConfig
from hstu_dist.data.config import DataSetConfig, is_made_here, prepare_command, recipe_of
from hstu_dist.data.contextual import check_contextual
from hstu_dist.data.schema import Manifest, load_manifest
from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.data.stream.source import check_reachable
from hstu_dist.distributed.arrangement import check_arrangement
from hstu_dist.distributed.config import ITEM, TableShape, TableSpec
from hstu_dist.distributed.table_plan import configured_plan, plan_of_settings
from hstu_dist.errors import UserError
from hstu_dist.losses.config import LossConfig, MultiTaskConfig
from hstu_dist.machine import memory_per_rank
from hstu_dist.models.config import RankingConfig
from hstu_dist.plugins import find
from hstu_dist.run_folder import RunFolder

_CHECKPOINTS_AT_ONCE = 3
"""Checkpoints on disk while one is written: the kept ones are the user's choice, best and new come on top."""


_LEAST_EVENTS = 4
"""Two to train on, one input and its target, and one each for validation and test."""


def preflight(
    config: RunConfig, world_size: int, *, trains: bool = True, device_type: str | None = None
) -> Manifest | None:
    """Checks a run on the machine that is going to start it.

    Args:
        config: the run.
        world_size: ranks.
        trains: whether it will write checkpoints, which take disk space.
        device_type: where a rank computes; None: as far as this machine tells.

    Returns:
        The manifest of its data; None for a stream.

    Raises:
        UserError: one line that says what does not fit and how to mend it.
    """
    for target in config.targets:
        find(target)
    if isinstance(config.data, StreamConfig):
        check_reachable(config.data.path)
        manifest, num_items = None, config.data.num_items
    else:
        manifest = _prepared(config)
        num_items = manifest.num_items
    check_ranks(config, world_size)
    check_plan(config, num_items, world_size // config.embedding.replicas, device_type)
    copies = config.trainer.checkpoint.keep + _CHECKPOINTS_AT_ONCE
    specs = specs_of(config, num_items)
    folder = RunFolder(config.run_dir)
    if not folder.config_file.exists():
        # a run that goes on cannot change it
        check_average(config)
    (table_bytes,) = configured_plan(specs, 1).bytes_per_rank(specs)
    folder.check(config, needed_bytes=table_bytes * copies + (1 << 20) if trains else 0)
    folder.check_data(config, manifest)
    return manifest


def _prepared(config: RunConfig) -> Manifest:
    """The manifest of a data set that can serve the run's task.

    Raises:
        UserError: it is not prepared, was prepared with other settings, lacks what is ranked by, or all of its
            sequences are too short.
    """
    data = config.prepared
    manifest = load_manifest(Path(data.path), prepare_command(data))
    check_recipe(data, manifest)
    if isinstance(config.task, RankingConfig):
        check_ranking(config.task, config.loss, manifest)
    elif config.task.split == "leave_one_out" and manifest.max_length < _LEAST_EVENTS:
        raise UserError(
            f"data set {data.path}: its longest sequence has {manifest.max_length} events, "
            f"leave-one-out training needs at least {_LEAST_EVENTS}",
            "prepare a data set with more events per user",
        )
    return manifest


def check_recipe(data: DataSetConfig, manifest: Manifest) -> None:
    """Whether a data set was prepared with the settings that name it.

    Raises:
        UserError: names the first that differs.
    """
    if not is_made_here(data):
        return
    for name, value in recipe_of(data).items():
        # a setting that a later version added is not in an older manifest
        made_with = manifest.recipe.get(name, value)
        if made_with != value:
            raise UserError(
                f"data.{name}: got {value}, but the data set {data.path} was prepared with {made_with}",
                "prepare it again with this setting, use another data.path, or give the setting that it has",
            )


def table_shapes(config: RunConfig, num_items: int) -> dict[str, TableShape]:
    """What the model needs of each table that it looks up."""
    return {ITEM: TableShape(num_items, config.model.width)}


def check_ranks(config: RunConfig, world_size: int) -> None:
    """Whether so many ranks can be arranged as the run asks, and a rank's share of a step cut into so many parts.

    Raises:
        UserError: they cannot, or the share has fewer sequences.
    """
    trainer = config.trainer
    check_arrangement(trainer.parallel, config.embedding, trainer.micro_batches, trainer.global_batch_size, world_size)


def check_ranking(task: RankingConfig, loss: LossConfig, manifest: Manifest) -> None:
    """Whether a data set has the columns that a ranking run names.

    Raises:
        UserError: names the one that is missing.
    """
    known = [field.name for field in action_fields(manifest.action_fields)]
    for head in loss.heads if isinstance(loss, MultiTaskConfig) else ():
        if head.column not in known:
            raise UserError(
                f"head {head.name}: got column {head.column}, the data set {manifest.name} has {', '.join(known)}",
                "set its column, or prepare the data with data.action_columns={NAME: BITS}",
            )
    check_contextual(manifest, task.contextual)


def check_plan(config: RunConfig, num_items: int, world_size: int, device_type: str | None = None) -> None:
    """Whether the fullest rank can hold its share of all tables and their optimizer state.

    On GPUs, whose memory is not known before the ranks start, of the tables that live in the host's. `device_type` as
    in `preflight`.

    Raises:
        UserError: more ranks than rows, a plan that does not fit, or more bytes than a rank has.
    """
    specs = specs_of(config, num_items)
    plan = plan_of_settings(config.embedding, specs, world_size)
    for name, table in plan.tables.items():
        if table.sharding == "row_wise" and table.rows < world_size:
            raise UserError(
                f"embedding table {name}: row_wise cannot split {table.rows} rows over {world_size} ranks",
                "use sharding=table_wise for it, or fewer ranks",
            )
    if on_gpus(config) if device_type is None else device_type == "cuda":
        specs = {name: spec for name, spec in specs.items() if spec.config.compute_kernel != "fused"}
        plan = replace(plan, tables={name: table for name, table in plan.tables.items() if name in specs})
    held = plan.bytes_per_rank(specs)
    needed, limit = max(held), memory_limit(config)
    if limit is not None and needed > limit:
        tables = "; ".join(
            f"{name}: {table.rows} rows, width {table.width}, {table.dtype}, {table.sharding}"
            for name, table in plan.tables.items()
        )
        raise UserError(
            f"embedding tables: {needed / 2**30:.2f} GiB on rank {held.index(needed)} of {world_size} ({tables}), "
            f"{limit / 2**30:.2f} GiB available",
            f"use {_enough_ranks(specs, limit)}dtype=fp16, an optimizer with less state, a smaller model.width, "
            "or a larger limit (cluster.memory_per_rank_gib)",
        )


def on_gpus(config: RunConfig) -> bool:
    """Whether a run computes on GPUs, as far as this machine tells."""
    device = config.trainer.device
    return device == "cuda" or (device == "auto" and shutil.which("nvidia-smi") is not None)


def check_average(config: RunConfig) -> None:
    """Whether the average of all rows is where the rows are.

    Raises:
        UserError: they are in the host's memory, and it would take the GPU's.
    """
    for name, spec in config.embedding.configured().items():
        kernel = spec.config.compute_kernel
        if kernel != "fused" and config.optimizer.average_decay is not None:
            raise UserError(
                f"embedding table {name}: got compute_kernel={kernel}, expected fused with optimizer.average_decay, "
                "which keeps the average of its rows in the GPU's memory",
                "use compute_kernel=fused, or optimizer.average_decay=null",
            )


def _enough_ranks(specs: Mapping[str, TableSpec], limit: int) -> str:
    """How many ranks would do, if any number would: copies stay whole."""
    copies = {name: spec for name, spec in specs.items() if spec.config.sharding == "data_parallel"}
    (whole,), (copied,) = (configured_plan(part, 1).bytes_per_rank(part) for part in (specs, copies))
    if copied >= limit:
        return ""
    return f"at least {-(-(whole - copied) // (limit - copied))} ranks with sharding=row_wise, "


def specs_of(config: RunConfig, num_items: int) -> dict[str, TableSpec]:
    """All tables of a run.

    Raises:
        UserError: a table has fewer rows than there are ids.
    """
    try:
        specs = config.embedding.specs(table_shapes(config, num_items))
    except ValueError as error:
        raise UserError(f"configuration: embedding.{error}", "correct it in YAML or as key=value") from error
    averaged = config.optimizer.average_decay is not None
    return {name: replace(spec, averaged=averaged) for name, spec in specs.items()}


def memory_limit(config: RunConfig) -> int | None:
    """Bytes of host memory of a rank; None on a machine that only launches the run elsewhere, where it is not known."""
    cluster = config.cluster
    if cluster.memory_per_rank_gib is not None:
        return max(1, int(cluster.memory_per_rank_gib * 2**30))
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE")
    if ranks_here is not None or cluster.kind == "local":
        return memory_per_rank(int(ranks_here or config.nproc))
    if cluster.kind != "hosts" and cluster.memory_gib is not None:
        return int(cluster.memory_gib * 2**30) // config.nproc
    return None
