"""Machines without a scheduler: one command each, printed to be started by hand, or run over ssh."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

from hstu_dist.cluster import DEFAULT_PORT, HostsConfig
from hstu_dist.config import RunConfig
from hstu_dist.console import say
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.run_folder import RunFolder
from launch.local import ended_by_request, stop_signals
from launch.node import NodeArguments
from launch.run_files import checked_folder, find_program

_POLL_SECONDS = 0.2


def commands(config: RunConfig) -> list[tuple[str, str]]:
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
        )
        lines.append((address, f"cd {here} && exec {shlex.join(arguments.words([sys.executable]))}"))
    return lines


def preview(config: RunConfig) -> str:
    """What `start` would run on which machine."""
    cluster = config.cluster
    assert isinstance(cluster, HostsConfig)
    if cluster.start == "ssh":
        return "\n".join(shlex.join([*cluster.ssh, address, line]) for address, line in commands(config))
    return "\n".join(f"# on {address}:\n{line}" for address, line in commands(config))


def start(config: RunConfig) -> int:
    """Starts the machines over ssh and waits for them, or says what to start by hand; returns the exit code."""
    cluster = config.cluster
    assert isinstance(cluster, HostsConfig)
    lines = commands(config)
    folder = checked_folder(config)
    if cluster.start == "print":
        say(preview(config))
        return ExitCode.FINISHED
    find_program(cluster.ssh[0])
    with contextlib.ExitStack() as stack:
        received = stack.enter_context(stop_signals())
        processes = [
            # a session of its own: Ctrl-C must not cut the connections before the ranks have saved
            subprocess.Popen([*cluster.ssh, address, line], stdin=subprocess.DEVNULL, start_new_session=True)
            for address, line in lines
        ]
        while any(process.poll() is None for process in processes):
            if received:
                # ssh hands no signals on; the ranks look for this file
                folder.stop_file.touch()
            with contextlib.suppress(subprocess.TimeoutExpired):
                next(p for p in processes if p.returncode is None).wait(_POLL_SECONDS)
    code = max(process.returncode for process in processes)
    if any(process.returncode < 0 for process in processes):
        code = ExitCode.FAILED
    return ended_by_request(folder, code, received)


def status(config: RunConfig) -> str:
    """Whether a rank holds the run folder's lock."""
    return "running" if RunFolder(config.run_dir).is_locked() else "not running"


def cancel(config: RunConfig) -> str:
    """Asks the ranks to save and stop."""
    folder = RunFolder(config.run_dir)
    if not folder.is_locked():
        raise UserError(f"run {folder.path}: not running", "nothing to cancel")
    folder.stop_file.touch()
    return "asked to save a checkpoint and stop"


def logs(config: RunConfig) -> str:
    """The end of every rank's output, where it was written to files."""
    folder = RunFolder(config.run_dir).logs
    files = sorted(path for path in folder.rglob("*.log") if path.stat().st_size) if folder.is_dir() else []
    if not files:
        return "no logs in the run folder: the ranks wrote to the terminal of the launch"
    newest = max(files, key=os.path.getmtime).parents[1]
    return "\n".join(tail(path) for path in files if newest in path.parents)


def tail(path: Path, lines: int = 20) -> str:
    """Name and last lines of a file."""
    last = path.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join([f"==> {path}", *last])
