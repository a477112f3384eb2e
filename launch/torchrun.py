"""The command line of one torchrun agent, which starts the ranks of one machine and watches them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence

from launch.spec import LaunchSpec


def agent_command(spec: LaunchSpec) -> list[str]:
    """Program and arguments: our agent, torchrun's options, then what every rank runs."""
    return [
        *(sys.executable, "-m", "hstu_dist.distributed.agent"),
        f"--nproc-per-node={spec.ranks}",
        f"--max-restarts={spec.max_restarts}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={spec.endpoint}",
        f"--shutdown-timeout={spec.stop_seconds}",
        *("-m", "hstu_dist", "train", "--config", str(spec.config_file)),
    ]


def agent_environment(spec: LaunchSpec) -> dict[str, str]:
    """Variables that the agent and its ranks get on top of the launcher's own."""
    return {"OMP_NUM_THREADS": str(spec.threads)}


def as_shell(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """One line that a shell runs the same way."""
    return shlex.join([*(f"{name}={value}" for name, value in environment.items()), *command])
