"""LaunchSpec: what every way of starting ranks needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hstu_dist.config import RunConfig
from hstu_dist.machine import cores_per_rank
from hstu_dist.run_folder import RunFolder

Program = Literal["train", "doctor"]
"""What the ranks run: the training, or in its place the report on what lies between them."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """How the agent of this machine finds those of the others.

    Attributes:
        endpoint: `host:port` of the first machine.
        run_id: the same on all machines.
        nodes: machines.
        min_nodes: machines that are enough when others are lost.
        node: this one; 0 is the first.
        address: this machine's own, by which the others reach it.
        interface: network interface with that address.
        join_seconds: how long to wait for the others.
    """

    endpoint: str
    run_id: str
    nodes: int
    min_nodes: int
    node: int
    address: str
    interface: str
    join_seconds: int


@dataclass(frozen=True, kw_only=True)
class LaunchSpec:
    """One launch of a checked run, seen from one machine.

    Attributes:
        config_file: the resolved settings that every rank reads.
        ranks: ranks of one machine.
        threads: CPU threads of a rank.
        max_restarts: how often all ranks are started again after a failure.
        stop_seconds: how long ranks that were asked to stop may take to save a checkpoint.
        meeting: the other machines; None: this one is alone.
        logs: folder for the output of every rank; None: the terminal only.
        program: what every rank runs.
    """

    config_file: Path
    ranks: int
    threads: int
    max_restarts: int = 0
    stop_seconds: int = 120
    meeting: Meeting | None = None
    logs: Path | None = None
    program: Program = "train"

    @classmethod
    def of(
        cls,
        config: RunConfig,
        config_file: Path | None = None,
        meeting: Meeting | None = None,
        logs: Path | None = None,
        program: Program = "train",
    ) -> LaunchSpec:
        """The launch of a run on this machine; by default from the run folder, without others and logs."""
        return cls(
            config_file=config_file or RunFolder(config.run_dir).launch_file,
            ranks=config.nproc,
            threads=config.trainer.threads or cores_per_rank(config.nproc),
            max_restarts=config.cluster.max_restarts,
            meeting=meeting,
            logs=logs,
            program=program,
        )
