"""Heartbeats of the ranks in their store, so that those who wait in vain can name the rank that they wait for."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

_INTERVAL_SECONDS = 1.0
_READ_SECONDS = 3.0


@dataclass(frozen=True)
class Beat:
    """One rank's sign of life.

    Attributes:
        count: grows while the process runs.
        step: steps that it has taken; -1: still starting.
    """

    count: int
    step: int


class Heartbeat:
    """A thread that says every second that this rank lives, whatever the rank itself is waiting for.

    Attributes:
        step: steps taken; set by who counts them.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        """Starts the thread; `store` is shared by all ranks, this connection to it by nobody else."""
        self.step = -1
        self._store = store
        self._store.set_timeout(timedelta(seconds=_READ_SECONDS))
        self._rank = rank
        self._keys = [f"beat-{number}" for number in range(size)]
        self._closed = threading.Event()
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        # it may be waiting for a store that is stopped
        self._thread.join(_INTERVAL_SECONDS)

    def whereabouts(self) -> str:
        """What can be said of the other ranks after one of them did not answer; takes a few seconds."""
        said: list[str] = []
        # a store whose process is stopped may never answer, whatever time-outs it has
        asking = threading.Thread(target=lambda: said.append(self._ask()), daemon=True)
        asking.start()
        asking.join(2.5 * _INTERVAL_SECONDS + _READ_SECONDS)
        # rank 0 keeps the store
        return said[0] if said else "rank 0 is gone, stopped or cannot be reached"

    def _ask(self) -> str:
        try:
            before = self._read()
            time.sleep(2.5 * _INTERVAL_SECONDS)
            return describe(before, self._read(), self._rank)
        except (RuntimeError, ValueError):
            return "rank 0 is gone, stopped or cannot be reached"

    def _read(self) -> list[Beat | None]:
        there = [self._store.check([key]) for key in self._keys]
        return [_parse(self._store.get(key)) if known else None for key, known in zip(self._keys, there, strict=True)]

    def _run(self) -> None:
        count = 0
        while not self._closed.wait(_INTERVAL_SECONDS):
            count += 1
            try:
                self._beat(count)
            except RuntimeError:
                # no store, no listeners
                return

    def _beat(self, count: int) -> None:
        self._store.set(self._keys[self._rank], f"{count} {self.step}")


def _parse(value: bytes) -> Beat:
    count, step = value.decode().split()
    return Beat(int(count), int(step))


def describe(before: list[Beat | None], after: list[Beat | None], rank: int) -> str:
    """Which ranks keep the others waiting.

    Args:
        before: beats of all ranks; None: it never gave one.
        after: a few intervals later.
        rank: of the reader, who is alive.
    """
    pairs = list(zip(before, after, strict=True))
    silent = [r for r, (old, new) in enumerate(pairs) if r != rank and (old is None or new is None or new == old)]
    if silent:
        places = {r: beat.step for r in silent if (beat := after[r]) is not None}
        where = [f"rank {r} {_place(places.get(r, -1))}" for r in silent[:4]]
        more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
        return f"silent (stopped, dead or cut off): {', '.join(where)}{more}"
    steps = [beat.step for beat in after if beat is not None]
    behind = [r for r, beat in enumerate(after) if beat is not None and beat.step < max(steps)]
    if behind:
        return f"alive, but behind the others: rank {behind[0]} {_place(steps[behind[0]])}, others at {max(steps)}"
    return "all ranks are alive and equally far"


def _place(step: int) -> str:
    return "before its first step" if step < 0 else f"after step {step}"
