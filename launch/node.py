"""What a cluster starts on each machine of a run: checks the way to the others, then runs the agent."""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

import psutil

from hstu_dist.config import RunConfig, load
from hstu_dist.console import report, say
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.run_folder import RunFolder
from launch.local import ended_by_request, run
from launch.run_files import finished_text
from launch.spec import LaunchSpec, Meeting, Program
from launch.torchrun import agent_command, agent_environment

T = TypeVar("T")

_RETRY_SECONDS = 1.0
_CONNECT_SECONDS = 5.0
_NAME_SECONDS = 60
"""How long the name of a pod may stay unknown, to itself too, after it has started."""
_ONE_MACHINE = ("localhost", "127.0.0.1")
"""Meeting points with which somebody plays several machines on one."""


class UnreachableError(UserError):
    """The way to the first machine is not there: unlike other bad input, it may get better by trying again."""


@dataclass(frozen=True, kw_only=True)
class NodeArguments:
    """What a machine must be told; the rest is in the settings.

    Attributes:
        config_file: resolved settings, on a file system that all machines see.
        endpoint: `host:port` where the agents meet, on the first machine.
        run_id: the same on all machines.
        node: number of the machine, or the environment variable that holds it.
        logs: folder for the output of all ranks.
        program: what the ranks run.
    """

    config_file: Path
    endpoint: str
    run_id: str
    node: str
    logs: Path
    program: Program = "train"

    def words(self, python: Sequence[str]) -> list[str]:
        """The command that starts `main` with these arguments."""
        return [
            *(*python, "-m", "launch.node"),
            *("--config", str(self.config_file)),
            *("--endpoint", self.endpoint),
            *("--run-id", self.run_id),
            *("--node", self.node),
            *("--logs", str(self.logs)),
            *(() if self.program == "train" else ("--program", self.program)),
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the agent of this machine, again if it is killed; returns its exit code."""
    try:
        parsed = _parse(arguments)
        config = settings(parsed)
        over = finished_text(config) if parsed.program == "train" and config.cluster.nodes > 1 else None
        if over is not None:
            # the others may have gone home
            say(over)
            return ExitCode.FINISHED
        spec = prepare(parsed, os.environ)
    except UnreachableError as error:
        report(error)
        return ExitCode.FAILED
    except UserError as error:
        report(error)
        return ExitCode.BAD_INPUT
    # as the ranks find it: its settings may lie elsewhere, in the ConfigMap of a pod
    folder = RunFolder(config.run_dir)
    code = run(
        agent_command(spec),
        agent_environment(spec),
        spec.max_restarts,
        lambda: folder.finished(config.trainer.last_epoch) is not None,
    )
    by_hand = config.cluster.kind == "hosts" and config.cluster.start == "print"
    if by_hand and (spec.meeting is None or spec.meeting.node == 0):
        # no launch waits for these machines; left behind, the file would stop the same lines at once, for ever
        code = ended_by_request(folder, code)
        folder.stop_file.unlink(missing_ok=True)
    return code


def settings(arguments: NodeArguments) -> RunConfig:
    """The run's settings, as this machine sees them.

    Raises:
        UserError: they cannot be seen here, or cannot be read.
    """
    if not arguments.config_file.exists():
        raise UserError(
            f"{socket.gethostname()}: {arguments.config_file} is not there",
            "set output=FOLDER to a folder that all machines see under the same path",
        )
    return load(arguments.config_file)


def prepare(arguments: NodeArguments, variables: Mapping[str, str]) -> LaunchSpec:
    """The launch as this machine sees it.

    Args:
        arguments: as given on the command line.
        variables: the environment.

    Raises:
        UserError: the settings cannot be seen here, the port is taken, or the first machine cannot be reached.
    """
    config = settings(arguments)
    node = _number(arguments.node, variables, config.cluster.nodes)
    meeting = _meeting(config, arguments, node) if config.cluster.nodes > 1 else None
    return LaunchSpec.of(config, arguments.config_file, meeting, arguments.logs / f"node{node}", arguments.program)


def _number(node: str, variables: Mapping[str, str], nodes: int) -> int:
    value = variables.get(node, node)
    if not value.isdecimal() or int(value) >= nodes:
        raise UserError(f"--node: got {value}, expected a number below {nodes}", "start one per machine")
    return int(value)


def _meeting(config: RunConfig, arguments: NodeArguments, node: int) -> Meeting:
    cluster = config.cluster
    assert cluster.kind != "local"
    host, _, port = arguments.endpoint.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--endpoint: got {arguments.endpoint!r}, expected HOST:PORT", "name the first machine")
    if node == 0:
        check_port_is_free(int(port))
    else:
        wait_for_host(host, int(port), cluster.join_seconds)
    patience = min(_NAME_SECONDS, cluster.join_seconds) if cluster.kind == "kubernetes" else 0
    address, interface = own_address(host, int(port), cluster.interface, patience)
    return Meeting(
        endpoint=arguments.endpoint,
        run_id=arguments.run_id,
        nodes=cluster.nodes,
        min_nodes=cluster.least_nodes,
        node=node,
        address=address,
        interface=interface,
        join_seconds=cluster.join_seconds,
    )


def check_port_is_free(port: int) -> None:
    """Whether this machine can listen on a port.

    Raises:
        UserError: another process does.
    """
    with socket.socket() as probe:
        # as the server will: connections of an earlier run that linger are no obstacle
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise UserError(f"{socket.gethostname()}: port {port} {why}", "set cluster.port to a free one") from error


def wait_for_host(host: str, port: int, seconds: float) -> None:
    """Returns once a machine answers; refusing a port is an answer, its agent may still be starting.

    Raises:
        UnreachableError: no answer in the given time.
    """

    def answer() -> None:
        with suppress(ConnectionRefusedError):
            socket.create_connection((host, port), timeout=min(_CONNECT_SECONDS, seconds)).close()

    _within(seconds, answer, f"{host} cannot be reached for {seconds:g} s")


def own_address(host: str, port: int, interface: str | None, seconds: float = 0) -> tuple[str, str]:
    """Address and network interface by which other machines reach this one.

    Args:
        host: the first machine, possibly this one.
        port: any; nothing is sent.
        interface: the one to use; None: the one that leads to `host`.
        seconds: how long to wait for a way to `host`.

    Raises:
        UserError: there is no such interface, it has no IPv4 address, or nobody else can reach it.
        UnreachableError: no way to `host` in the given time.
    """
    addresses = {name: [a.address for a in known] for name, known in psutil.net_if_addrs().items()}
    if interface is not None:
        ipv4 = [a.address for a in psutil.net_if_addrs().get(interface, []) if a.family == socket.AF_INET]
        if not ipv4:
            raise UserError(
                f"{socket.gethostname()}: cluster.interface: got {interface}, expected one with an IPv4 address",
                f"choose among {', '.join(sorted(addresses))}",
            )
        return ipv4[0], interface

    def towards_host() -> str:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            return str(probe.getsockname()[0])

    address = _within(seconds, towards_host, f"no way to {host}")
    names = [name for name, known in addresses.items() if address in known]
    # Debian's hosts file gives a machine's own name to 127.0.1.1, where nobody else finds it
    if not names or (address.startswith("127.") and host not in _ONE_MACHINE):
        raise UserError(
            f"{socket.gethostname()}: {host} leads to {address}, which other machines cannot reach",
            f"set cluster.interface to one of {', '.join(sorted(addresses))}",
        )
    return address, names[0]


def _within(seconds: float, attempt: Callable[[], T], problem: str) -> T:
    """What an attempt gives, which is repeated while the network refuses it.

    Raises:
        UnreachableError: in all the given time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return attempt()
        except OSError as error:
            if time.monotonic() + _RETRY_SECONDS > deadline:
                raise UnreachableError(
                    f"{socket.gethostname()}: {problem} ({error.strerror or error})",
                    "check its name, the network and firewalls, or set cluster.interface",
                ) from error
        time.sleep(_RETRY_SECONDS)


def _parse(arguments: Sequence[str] | None) -> NodeArguments:
    parser = argparse.ArgumentParser(prog="python -m launch.node", description="The agent of one machine of a run.")
    parser.add_argument("--config", type=Path, required=True, help="resolved settings")
    parser.add_argument("--endpoint", required=True, help="HOST:PORT on the first machine")
    parser.add_argument("--run-id", required=True, help="the same on all machines")
    parser.add_argument("--node", required=True, help="number of this machine, or the variable that holds it")
    parser.add_argument("--logs", type=Path, required=True, help="folder for the output of the ranks")
    parser.add_argument("--program", choices=get_args(Program), default="train", help="what the ranks run")
    options = parser.parse_args(arguments)
    return NodeArguments(
        config_file=options.config,
        endpoint=options.endpoint,
        run_id=options.run_id,
        node=options.node,
        logs=options.logs,
        program=options.program,
    )


if __name__ == "__main__":
    sys.exit(main())
