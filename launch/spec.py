"""LaunchSpec: what every way of starting ranks needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hstu_dist.config import RunConfig
from hstu_dist.machine import cores_per_rank
from hstu_dist.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """One launch of a checked run.

    Attributes:
        config_file: the resolved settings that every rank reads.
        ranks: ranks of one machine.
        threads: CPU threads of a rank.
        max_restarts: how often all ranks are started again after a failure.
        endpoint: `host:port` where the agents of all machines meet; port 0 takes a free one.
        stop_seconds: how long ranks that were asked to stop may take to save a checkpoint.
    """

    config_file: Path
    ranks: int
    threads: int
    max_restarts: int = 0
    endpoint: str = "localhost:0"
    stop_seconds: int = 120

    @classmethod
    def of(cls, config: RunConfig) -> LaunchSpec:
        """The launch of a run on this machine alone."""
        return cls(
            config_file=RunFolder(config.run_dir).launch_file,
            ranks=config.nproc,
            threads=config.trainer.threads or cores_per_rank(config.nproc),
            max_restarts=config.cluster.max_restarts,
        )
