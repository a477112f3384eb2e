"""What can be refused before any rank starts: missing data, a plan that does not fit, a bad run folder; no torch."""

from __future__ import annotations

import os
from pathlib import Path

from hstu_dist.config import RunConfig
from hstu_dist.data.schema import Manifest, load_manifest
from hstu_dist.errors import UserError
from hstu_dist.machine import memory_per_rank
from hstu_dist.run_folder import RunFolder

_CHECKPOINTS_AT_ONCE = 3
"""Checkpoints on disk while one is written: the kept ones are the user's choice, best and new come on top."""


def preflight(config: RunConfig, world_size: int) -> Manifest:
    """Checks a run on the machine that is going to start it.

    Args:
        config: the run.
        world_size: ranks.

    Returns:
        The manifest of its data.

    Raises:
        UserError: one line that says what does not fit and how to mend it.
    """
    manifest = load_manifest(Path(config.data.path))
    table_bytes = check_plan(config, manifest.num_items, world_size)
    copies = config.trainer.checkpoint.keep + _CHECKPOINTS_AT_ONCE
    RunFolder(config.run_dir).check(config, needed_bytes=table_bytes * world_size * copies + (1 << 20))
    return manifest


def check_plan(config: RunConfig, num_items: int, world_size: int) -> int:
    """Bytes of table and optimizer state on the fullest rank.

    Raises:
        UserError: more ranks than rows, or more bytes than a rank has.
    """
    embedding = config.embedding
    if embedding.sharding == "row_wise" and num_items < world_size:
        raise UserError(
            f"embedding.sharding: row_wise cannot split {num_items} rows over {world_size} ranks",
            "use embedding=table_wise or fewer ranks",
        )
    needed = embedding.bytes_per_rank(num_items, config.model.width, world_size)
    limit = _memory_per_rank(config)
    if needed > limit:
        enough = -(-embedding.bytes_per_rank(num_items, config.model.width, 1) // limit)
        remedy = f"use at least {enough} ranks with embedding=row_wise, a smaller model.width, or a larger limit"
        raise UserError(
            f"item table: {needed / 2**30:.2f} GiB on a rank ({num_items} rows, width {config.model.width}, "
            f"{world_size} ranks, {embedding.sharding}), {limit / 2**30:.2f} GiB available",
            f"{remedy} (cluster.memory_per_rank_gib)",
        )
    return needed


def _memory_per_rank(config: RunConfig) -> int:
    if config.cluster.memory_per_rank_gib is not None:
        return int(config.cluster.memory_per_rank_gib * 2**30)
    return memory_per_rank(int(os.environ.get("LOCAL_WORLD_SIZE", config.nproc)))
