"""All ranks on this machine: an agent as a child process, which is handed the request to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hstu_dist.config import RunConfig
from hstu_dist.console import note, report
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.run_folder import RunFolder
from launch.run_files import checked_folder
from launch.spec import LaunchSpec, Program
from launch.torchrun import agent_command, agent_environment, as_shell

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_POLL_SECONDS = 0.1


def preview(config: RunConfig, program: Program = "train") -> str:
    """The command that `start` would run."""
    spec = LaunchSpec.of(config, program=program)
    return as_shell(agent_command(spec), agent_environment(spec))


def start(config: RunConfig, program: Program = "train") -> int:
    """Starts the ranks and waits for them; returns the exit code."""
    folder = checked_folder(config, program)
    spec = LaunchSpec.of(config, program=program)
    return ended_by_request(folder, run(agent_command(spec), agent_environment(spec), spec.max_restarts))


def ended_by_request(folder: RunFolder, code: int, signals: Sequence[int] = ()) -> int:
    """The exit code of a launch whose ranks ended with `code`; clears a request to stop that they have met."""
    if code != ExitCode.FINISHED or not folder.stop_file.exists():
        return code
    folder.stop_file.unlink()
    return 128 + signals[0] if signals else ExitCode.STOPPED


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    restarts: int = 0,
    finished: Callable[[], bool] = lambda: False,
) -> int:
    """Starts the agent and waits for it; the first SIGTERM, SIGINT or SIGHUP stops it, later ones change nothing.

    Args:
        command: program and arguments.
        environment: variables on top of this process's own.
        restarts: how often an agent is started again that was killed, or that lost the first machine's agent.
        finished: whether the run has nothing left to do: then nobody is missed.

    Returns:
        The agent's exit code; FAILED if it was killed; 128 + signal if a signal stopped it before it finished.
    """
    with stop_signals() as received:
        while True:
            code = _run_once(command, environment, received)
            if received or restarts == 0 or (code >= 0 and code != ExitCode.PEER_LOST):
                break
            if finished():
                return ExitCode.FINISHED
            restarts -= 1
            note(f"{_end(code)}; starting it again ({restarts} restarts left)")
    if code == ExitCode.FINISHED:
        return code
    if received:
        return 128 + received[0]
    if code < 0 or code == ExitCode.PEER_LOST:
        report(UserError(_end(code), "the same command continues from the last checkpoint"))
        return ExitCode.FAILED
    return code


def _end(code: int) -> str:
    if code < 0:
        return f"the agent of the ranks was killed by {signal.Signals(-code).name}"
    return "the agent of the ranks lost the first machine's agent"


def _run_once(command: Sequence[str], environment: Mapping[str, str], received: Sequence[int]) -> int:
    """One agent from start to end; `received` fills with the signals that stop it."""
    # a session of its own: Ctrl-C reaches the agent once, through us, and not a second time from the terminal
    agent = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)
    while not received and agent.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(_POLL_SECONDS)
    if received:
        # always SIGTERM: Python answers SIGINT with a stack trace wherever nobody handles it
        agent.terminate()
    return agent.wait()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects signals instead of dying of them; what `nohup` ignores stays ignored."""
    received: list[int] = []

    def remember(number: int, _frame: Any) -> None:
        received.append(number)

    heeded = [number for number in _STOP if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, remember) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
