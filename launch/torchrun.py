"""The command line of one torchrun agent, which starts the ranks of one machine and watches them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence

from launch.spec import LaunchSpec, Meeting

_LAST_CALL_SECONDS = 5
"""All machines are known beforehand: once they are there, nobody else is waited for."""


def agent_command(spec: LaunchSpec) -> list[str]:
    """Program and arguments: our agent, torchrun's options, then what every rank runs."""
    meeting = ["--rdzv-endpoint=localhost:0"] if spec.meeting is None else _meeting(spec.meeting)
    # every rank's output goes to a file of its own and, with the rank in front, to the agent's
    logs = [] if spec.logs is None else [f"--log-dir={spec.logs}", "--tee=3"]
    return [
        *(sys.executable, "-m", "hstu_dist.distributed.agent"),
        f"--nproc-per-node={spec.ranks}",
        f"--max-restarts={spec.max_restarts}",
        "--rdzv-backend=c10d",
        *meeting,
        f"--shutdown-timeout={spec.stop_seconds}",
        *logs,
        *("-m", "hstu_dist", "train", "--config", str(spec.config_file)),
    ]


def _meeting(meeting: Meeting) -> list[str]:
    settings = {
        # torchrun's own guess compares host names, which fails for addresses and inside containers
        "is_host": str(meeting.node == 0).lower(),
        "join_timeout": meeting.join_seconds,
        "last_call_timeout": _LAST_CALL_SECONDS,
        # its default of a minute would end the agents for good when the network is away for longer
        "read_timeout": max(meeting.join_seconds, 60),
    }
    return [
        f"--nnodes={meeting.nodes}",
        f"--rdzv-id={meeting.run_id}",
        f"--rdzv-endpoint={meeting.endpoint}",
        f"--rdzv-conf={','.join(f'{name}={value}' for name, value in settings.items())}",
        f"--local-addr={meeting.address}",
    ]


def agent_environment(spec: LaunchSpec) -> dict[str, str]:
    """Variables that the agent and its ranks get on top of the launcher's own."""
    environment = {"OMP_NUM_THREADS": str(spec.threads)}
    if spec.meeting is not None:
        # both libraries otherwise take the first interface, or what the host name resolves to
        environment |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), spec.meeting.interface)
        # agents count restarts each for itself, so that ranks cannot tell by the count which keys of a store that
        # lives on are stale: every attempt gets a new store
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return environment


def as_shell(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """One line that a shell runs the same way."""
    return shlex.join([*(f"{name}={value}" for name, value in environment.items()), *command])
