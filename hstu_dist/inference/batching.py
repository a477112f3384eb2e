"""Answers requests in batches: whoever waits while one batch is computed makes up the next one.

Nothing is delayed for the sake of a batch. The line is short, so that an overload is refused at once, not answered too
late: in number, and in time, by what jobs took of late. What has waited too long is dropped before it is computed.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Job = TypeVar("Job")
Answer = TypeVar("Answer")


_SMOOTHING = 0.2
"""Weight of the latest batch in what a job takes."""


class OverloadedError(Exception):
    """The line is full."""


class LateError(Exception):
    """The time for an answer is over."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the line and of a batch.

    Attributes:
        pending: jobs that may wait.
        jobs: of a batch.
        cost: of a batch, but for a single job.
        seconds: from a job's arrival to its answer.
    """

    pending: int
    jobs: int
    cost: int
    seconds: float


@dataclass(frozen=True)
class _Waiting(Generic[Job, Answer]):
    job: Job
    cost: int
    deadline: float
    answer: asyncio.Future[Answer] = field(compare=False)


class Batcher(Generic[Job, Answer]):
    """A line of jobs before one thread that computes; used from one event loop.

    Attributes:
        limits: of the line and of a batch.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Job]], Sequence[Answer]],
        limits: Limits,
        observe: Callable[[int, float], None],
        prepare: Callable[[], None],
    ) -> None:
        """Nothing runs before `start`.

        Args:
            compute: one answer for each job, in order; runs in a thread, never twice at once.
            limits: of the line and of a batch.
            observe: is told the jobs and the seconds of each batch.
            prepare: what the thread does first.
        """
        self.limits = limits
        self._compute = compute
        self._observe = observe
        self._line: deque[_Waiting[Job, Answer]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="score", initializer=prepare)
        self._worker: asyncio.Task[None] | None = None
        self._job_seconds = 0.0

    @property
    def pending(self) -> int:
        """Jobs that wait."""
        return len(self._line)

    async def start(self, rehearsal: Sequence[Job]) -> None:
        """Computes a batch that nobody asked for, then begins to answer."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, rehearsal)
        self._worker = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Ends the work; jobs that still wait are never answered."""
        if self._worker is not None:
            self._worker.cancel()
            with suppress(asyncio.CancelledError):
                await self._worker
        self._thread.shutdown(wait=True)

    async def submit(self, job: Job, cost: int) -> Answer:
        """The answer of a job.

        Args:
            job: what to compute.
            cost: counts towards the bound of a batch.

        Raises:
            OverloadedError: too many wait.
            LateError: there was no answer in time.
            Exception: what the computation of its batch raised.
        """
        # half of the time is left for the batch under way and for the job's own
        would_wait = len(self._line) * self._job_seconds
        if len(self._line) >= self.limits.pending or would_wait > self.limits.seconds / 2:
            raise OverloadedError
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(job, cost, time.monotonic() + self.limits.seconds, answer)
        self._line.append(waiting)
        self._arrived.set()
        try:
            async with asyncio.timeout(self.limits.seconds):
                return await answer
        except TimeoutError as error:
            raise LateError from error
        finally:
            # nobody listens any more, whether it was late or the client went away
            answer.cancel()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            start = time.monotonic()
            jobs = [waiting.job for waiting in batch]
            try:
                answers = await loop.run_in_executor(self._thread, self._compute, jobs)
            except Exception as error:  # whatever it is, it belongs to those who wait for it
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                continue
            seconds = time.monotonic() - start
            self._job_seconds += _SMOOTHING * (seconds / len(batch) - self._job_seconds)
            self._observe(len(batch), seconds)
            for waiting, answer in zip(batch, answers, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(answer)

    def _next_batch(self) -> list[_Waiting[Job, Answer]]:
        batch: list[_Waiting[Job, Answer]] = []
        cost = 0
        while self._line and len(batch) < self.limits.jobs:
            waiting = self._line[0]
            if waiting.answer.done() or waiting.deadline < time.monotonic():
                self._line.popleft()
                continue
            if batch and cost + waiting.cost > self.limits.cost:
                break
            batch.append(self._line.popleft())
            cost += waiting.cost
        return batch
