"""torchrun's agent, changed where a run would otherwise hang, lose work, or try again what cannot succeed."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from hstu_dist.errors import ExitCode

_FAREWELL_SECONDS = 8.0
"""For ranks to notice that one of them is gone, look which one, and say so."""
_SAVED_SECONDS = 60.0
"""For the other ranks to end after the first one of a run that was asked to stop has ended."""
_EXIT_BARRIER_SECONDS = 60.0
"""For the agents of other machines to see that their ranks have finished, too."""

logger = logging.getLogger(__name__)


class LocalAgent(LocalElasticAgent):
    """Starts and watches the ranks of one machine.

    - Ranks that still run after another one has failed are ended soon: they wait for the dead. torchrun would give
      them as long as a rank that is asked to stop needs to save.
    - Bad input is not tried again.
    - Ranks that a signal made stop have saved; starting them again, as when a machine joins, is no failure.
    - A second signal does not cut short the time that ranks have to save.
    """

    def __init__(self, *args: Any, describe: Callable[[Mapping[int, ProcessFailure]], str], **kwargs: Any) -> None:
        """As torchrun's; `describe` puts a failure into words, for the log of restarts."""
        super().__init__(*args, **kwargs)
        self._exit_barrier_timeout = _EXIT_BARRIER_SECONDS
        self._describe = describe

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        abandoned = self._end_abandoned()
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state != WorkerState.FAILED:
            return result
        for worker in worker_group.workers:
            if worker.local_rank in abandoned and worker.global_rank in result.failures:
                # ended by this agent: a consequence, whatever its exit code
                result.failures[worker.global_rank].exitcode = ExitCode.PEER_LOST
        codes = {failure.exitcode for failure in result.failures.values()}
        if ExitCode.BAD_INPUT in codes:
            self._remaining_restarts = 0
        elif codes == {ExitCode.STOPPED}:
            self._remaining_restarts += 1
        elif self._remaining_restarts:
            logger.warning("%s", self._describe(result.failures))
        return result

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        # one that was stopped by SIGSTOP can end by itself only if it runs
        for process in self._running().values():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
        # not torchrun's 30 seconds: where a machine joins, the ranks save first
        self._shutdown(timeout=self._shutdown_timeout)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        with _signals_later():
            super()._shutdown(death_sig, timeout)

    def _running(self) -> Mapping[int, Any]:
        """Process of every local rank that has not ended."""
        if not isinstance(self._pcontext, SubprocessContext):
            return {}
        handlers = self._pcontext.subprocess_handlers
        return {rank: handler.proc for rank, handler in handlers.items() if handler.proc.poll() is None}

    def _end_abandoned(self) -> set[int]:
        """Ends the ranks that have nobody to work with any more; returns which."""
        if not isinstance(self._pcontext, SubprocessContext):
            return set()
        codes = {handler.proc.poll() for handler in self._pcontext.subprocess_handlers.values()} - {None, 0}
        if not codes:
            return set()
        deadline = time.monotonic() + (_SAVED_SECONDS if codes == {ExitCode.STOPPED} else _FAREWELL_SECONDS)
        # one that is stopped can notice nothing
        while (
            (running := self._running()) and time.monotonic() < deadline and not all(map(_is_stopped, running.values()))
        ):
            time.sleep(0.1)
        for process in running.values():
            with suppress(ProcessLookupError):
                # not only the rank: it leads a session of its own
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return set(running)


def _is_stopped(process: Any) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    return False


@contextmanager
def _signals_later() -> Iterator[None]:
    """Signals that arrive in the block are handled after it."""
    received: list[tuple[int, FrameType | None]] = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    previous = {number: signal.signal(number, lambda *arrived: received.append(arrived)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:
            first, frame = received[0]
            handler = previous[signal.Signals(first)]
            if callable(handler):
                handler(first, frame)
