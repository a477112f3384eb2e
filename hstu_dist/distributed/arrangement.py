"""Whether ranks can be arranged as a run asks; no torch."""

from __future__ import annotations

from hstu_dist.distributed.config import EmbeddingConfig, ParallelConfig
from hstu_dist.errors import UserError


def check_arrangement(
    parallel: ParallelConfig, embedding: EmbeddingConfig, micro_batches: int, global_batch_size: float, world_size: int
) -> None:
    """Whether so many ranks form the groups and replicas, and a rank's share of a step has a sequence for every part.

    Args:
        parallel: how the tower is split.
        embedding: how tables are copied.
        micro_batches: parts of a rank's share.
        global_batch_size: sequences of a step, over all ranks.
        world_size: ranks.

    Raises:
        UserError: they cannot, or the share has fewer sequences.
    """
    parallel.check(world_size)
    embedding.check_replicas(world_size)
    share = global_batch_size / world_size
    if micro_batches > max(1, share):
        raise UserError(
            f"trainer.micro_batches: got {micro_batches}, but a rank's share of a step has {share:g} sequences",
            f"use at most {max(1, int(share))}, fewer ranks or a larger trainer.global_batch_size",
        )
