"""The command line of one torchrun agent, which starts the ranks of one machine and watches them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence

from launch.spec import LaunchSpec, Meeting

_LAST_CALL_SECONDS = 5
"""How long machines that are enough wait for more of them."""
_KEEP_ALIVE = {"keep_alive_interval": 2, "keep_alive_max_attempt": 4}
"""A machine that has said nothing for so many times as many seconds is lost: soon enough to go on without it."""


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
        *("-m", "hstu_dist", spec.program, "--config", str(spec.config_file)),
    ]


def _meeting(meeting: Meeting) -> list[str]:
    settings = {
        # torchrun's own guess compares host names, which fails for addresses and inside containers
        "is_host": str(meeting.node == 0).lower(),
        "join_timeout": meeting.join_seconds,
        "last_call_timeout": _LAST_CALL_SECONDS,
        # its default of a minute would end the agents for good when the network is away for longer
        "read_timeout": max(meeting.join_seconds, 60),
        **_KEEP_ALIVE,
    }
    nodes = f"{meeting.min_nodes}:{meeting.nodes}" if meeting.min_nodes < meeting.nodes else str(meeting.nodes)
    return [
        f"--nnodes={nodes}",
        f"--rdzv-id={meeting.run_id}",
        f"--rdzv-endpoint={meeting.endpoint}",
        f"--rdzv-conf={','.join(f'{name}={value}' for name, value in settings.items())}",
        f"--local-addr={meeting.address}",
    ]


def agent_environment(spec: LaunchSpec) -> dict[str, str]:
    """Variables that the agent and its ranks get on top of the launcher's own."""
    # of the agent's own library only what ends the process: a lost connection has a line of ours
    environment = {"OMP_NUM_THREADS": str(spec.threads), "TORCH_CPP_LOG_LEVEL": "FATAL"}
    if spec.meeting is not None:
        # both libraries otherwise take the first interface, or what the host name resolves to
        environment |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), spec.meeting.interface)
    return environment


def as_shell(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """One line that a shell runs the same way."""
    return shlex.join([*(f"{name}={value}" for name, value in environment.items()), *command])
