"""Machines without a scheduler: one command each, printed to be started by hand, or run over ssh."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

from hstu_dist.cluster import DEFAULT_PORT, HostsConfig
from hstu_dist.config import RunConfig
from hstu_dist.console import note, say
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.run_folder import RunFolder
from launch.local import ended_by_request, stop_signals
from launch.node import NodeArguments
from launch.run_files import checked_folder, find_program, progress
from launch.spec import Program

_POLL_SECONDS = 0.2
_UNREACHED = 255
_RETURN_SECONDS = 10.0
"""Between attempts to bring back a machine that was lost."""


def commands(config: RunConfig, program: Program = "train") -> list[tuple[str, str]]:
    """Address and shell line of each machine.

    Raises:
        UserError: no machine is named.
    """
    cluster = config.cluster
    assert isinstance(cluster, HostsConfig)
    if not cluster.addresses:
        raise UserError("cluster.addresses: got none", "name the machines: cluster.addresses=[host1,host2]")
    # the machines share folders under the same paths; where they were started from does not matter
    folder = RunFolder(config.run_dir.absolute())
    here = shlex.quote(str(Path.cwd()))
    lines = []
    for node, address in enumerate(cluster.addresses):
        arguments = NodeArguments(
            config_file=folder.launch_file,
            endpoint=f"{cluster.addresses[0]}:{cluster.port or DEFAULT_PORT}",
            run_id=config.name,
            node=str(node),
            logs=folder.logs,
            program=program,
        )
        lines.append((address, f"cd {here} && exec {shlex.join(arguments.words([sys.executable]))}"))
    return lines


def preview(config: RunConfig, program: Program = "train") -> str:
    """What `start` would run on which machine."""
    cluster = config.cluster
    assert isinstance(cluster, HostsConfig)
    if cluster.start == "ssh":
        return "\n".join(shlex.join([*cluster.ssh, address, line]) for address, line in commands(config, program))
    return "\n".join(f"# on {address}:\n{line}" for address, line in commands(config, program))


def start(config: RunConfig, program: Program = "train") -> int:
    """Starts the machines over ssh and waits for them, or says what to start by hand; returns the exit code."""
    cluster = config.cluster
    assert isinstance(cluster, HostsConfig)
    lines = commands(config, program)
    folder = checked_folder(config, program)
    if cluster.start == "print":
        say(preview(config, program))
        return ExitCode.FINISHED
    find_program(cluster.ssh[0])
    with stop_signals() as received:
        machines = [_Machine([*cluster.ssh, address, line]) for address, line in lines]
        while any(machine.running for machine in machines):
            if received:
                # ssh hands no signals on; the ranks look for this file
                folder.stop_file.touch()
            elif cluster.least_nodes < cluster.nodes:
                over = any(machine.finished for machine in machines)
                for machine, address in zip(machines, cluster.addresses, strict=True):
                    machine.give_up() if over else machine.start_again_if_lost(address)
            time.sleep(_POLL_SECONDS)
    codes = [machine.code for machine in machines]
    if cluster.least_nodes < cluster.nodes and ExitCode.FINISHED in codes:
        # those that were lost are not missed
        return ended_by_request(folder, ExitCode.FINISHED, received)
    return ended_by_request(folder, max(codes), received)


class _Machine:
    """The command that runs the ranks of one machine, and waits for them."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._lost_since: float | None = None
        self._returning = False
        self._process = self._start()

    @property
    def running(self) -> bool:
        """Whether its ranks have not ended."""
        return self._process.poll() is None

    @property
    def finished(self) -> bool:
        """Whether its ranks have reached the end of the run."""
        return self._process.poll() == ExitCode.FINISHED

    @property
    def code(self) -> int:
        """How it ended; ssh ends with 255 itself if it does not reach the machine."""
        code = self._process.returncode
        return ExitCode.FAILED if code < 0 or code == _UNREACHED else code

    def give_up(self) -> None:
        """No longer waits for a machine that was lost and is on its way back: the run is over."""
        if self._returning and self.running:
            self._process.terminate()

    def start_again_if_lost(self, address: str) -> None:
        """Tries to bring back a machine without which the others go on, every few seconds."""
        if self.running or self.code in (ExitCode.FINISHED, ExitCode.BAD_INPUT):
            return
        now = time.monotonic()
        if self._lost_since is None:
            self._lost_since = now
            note(f"{address} is lost (exit code {self._process.returncode}); the others go on, it is tried again")
        elif now - self._lost_since >= _RETURN_SECONDS:
            self._lost_since, self._returning = None, True
            self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # a session of its own: Ctrl-C must not cut the connections before the ranks have saved
        return subprocess.Popen(self._command, stdin=subprocess.DEVNULL, start_new_session=True)


def status(config: RunConfig) -> str:
    """Whether a rank holds the run folder's lock, and how far the run has come."""
    return f"{'running' if RunFolder(config.run_dir).is_locked() else 'not running'}; {progress(config)}"


def cancel(config: RunConfig) -> str:
    """Asks the ranks to save and stop."""
    folder = RunFolder(config.run_dir)
    if not folder.is_locked():
        raise UserError(f"run {folder.path}: not running", "nothing to cancel")
    folder.stop_file.touch()
    return "asked to save a checkpoint and stop"


def logs(config: RunConfig) -> str:
    """The end of every rank's log."""
    folder = RunFolder(config.run_dir).logs / "ranks"
    files = sorted(path for path in folder.glob("*.log") if path.stat().st_size)
    return "\n".join(tail(path) for path in files) or "no logs in the run folder: no rank has started yet"


def tail(path: Path, lines: int = 20) -> str:
    """Name and last lines of a file."""
    last = path.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join([f"==> {path}", *last])
