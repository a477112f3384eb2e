"""Make the next items in a background thread while the current one is being used."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Generic, TypeVar

T = TypeVar("T")

# how often a thread with a full queue looks whether anybody still wants its items, seconds
_POLL = 0.05


@dataclass(frozen=True)
class _Message(Generic[T]):
    """One item, or how the source ended: by itself (no error) or by an error."""

    item: T | None = None
    is_end: bool = False
    error: BaseException | None = None


def prefetch(source: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The items of `source`, up to `depth` of them made ahead of time.

    The thread starts with the first item asked for and ends with the source, with `close()`, or when the
    generator is dropped. An error in the source is raised here, after the items before it.

    Args:
        source: used in the thread only.
        depth: >= 0; 0 uses no thread.

    Raises:
        ValueError: depth is negative.
    """
    if depth < 0:
        raise ValueError(f"depth: got {depth}, expected >= 0")
    return _prefetch(source, depth) if depth else _plain(source)


def _plain(source: Iterable[T]) -> Generator[T, None, None]:
    yield from source


def _prefetch(source: Iterable[T], depth: int) -> Generator[T, None, None]:
    queue: Queue[_Message[T]] = Queue(depth)
    stop = Event()
    thread = Thread(target=_produce, args=(source, queue, stop), name="prefetch", daemon=True)
    thread.start()
    try:
        while not (message := queue.get()).is_end:
            yield message.item  # type: ignore[misc]
        if message.error is not None:
            raise message.error
    finally:
        stop.set()
        with suppress(Empty):
            while True:
                queue.get_nowait()
        thread.join()


def _produce(source: Iterable[T], queue: Queue[_Message[T]], stop: Event) -> None:
    end: _Message[T] = _Message(is_end=True)
    try:
        for item in source:
            if not _put(queue, _Message(item), stop):
                return
    except BaseException as error:
        end = _Message(is_end=True, error=error)
    _put(queue, end, stop)


def _put(queue: Queue[_Message[T]], message: _Message[T], stop: Event) -> bool:
    """False if nobody wants the message any more."""
    while not stop.is_set():
        with suppress(Full):
            queue.put(message, timeout=_POLL)
            return True
    return False
