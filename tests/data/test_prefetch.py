"""Prefetching keeps order and errors, runs ahead by its depth and no further, and never leaves a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from hstu_dist.data.prefetch import prefetch


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_items_in_order(depth: int) -> None:
    assert list(prefetch(iter(range(50)), depth)) == list(range(50))
    assert not threads()


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_arrives_after_the_items_before_it(depth: int) -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("broken")

    items = prefetch(source(), depth)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(KeyError, match="broken"):
        next(items)
    assert not threads()


def test_runs_ahead_by_its_depth_only() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    items = prefetch(source(), 3)
    assert next(items) == 0
    time.sleep(0.3)
    # one handed over, three in the queue, one waiting for a place
    assert len(made) == 5
    items.close()
    assert not threads()


def test_closing_early_ends_the_thread_and_the_source() -> None:
    ended = threading.Event()

    def source() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            ended.set()

    items = prefetch(source(), 2)
    next(items)
    assert len(threads()) == 1
    items.close()
    assert not threads() and ended.wait(5)


def test_negative_depth() -> None:
    with pytest.raises(ValueError, match="depth: got -1, expected >= 0"):
        prefetch([], -1)
