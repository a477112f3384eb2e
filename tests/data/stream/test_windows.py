"""When windows close, which events are late, and that nothing depends on how files cut the stream."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.data.stream.reading import Events
from hstu_dist.data.stream.windows import ClosedWindow, Windower
from tests.data.stream.cases import HOUR, START, config_of


def at(*hours: float, user: int = 0) -> Events:
    """Events at hours since the start, numbered by their items."""
    seconds = np.array([START + round(hour * HOUR) for hour in hours], dtype=np.int64)
    return Events(np.full(len(hours), user), np.arange(len(hours)), seconds, np.zeros(len(hours), dtype=np.int32))


def closed(windower: Windower, at_end: bool = False) -> list[ClosedWindow]:
    found = []
    while window := windower.close(at_end):
        found.append(window)
    return found


def hours_of(windows: list[ClosedWindow]) -> list[tuple[float, int]]:
    return [((window.start - START) / HOUR, len(window.events)) for window in windows]


def test_a_window_closes_when_the_watermark_passes_its_end() -> None:
    windower = Windower(config_of("x", lateness_seconds=600))
    windower.add(at(0.1, 0.5, 1.1))
    # the watermark is ten minutes behind
    assert closed(windower) == [] and windower.watermark == START + round(1.1 * HOUR) - 600
    windower.add(at(1.2))
    assert hours_of(closed(windower)) == [(0, 2)]
    assert hours_of(closed(windower, at_end=True)) == [(1, 2)]
    assert windower.counts.late == 0 and windower.counts.read == 4


def test_within_the_lateness_an_event_is_not_late() -> None:
    windower = Windower(config_of("x", lateness_seconds=HOUR))
    windower.add(at(0.1, 1.9))
    windower.add(at(0.95, 0.9))
    (first,) = closed(windower, at_end=True)[:1]
    assert windower.counts.late == 0
    assert np.diff(first.events.seconds).min() >= 0 and len(first.events) == 3


@pytest.mark.parametrize(("late", "expected"), [("drop", [(0, 1), (2, 2)]), ("add", [(0, 1), (2, 3)])])
def test_late_events_are_counted_and_dropped_or_added(late: str, expected: list[tuple[float, int]]) -> None:
    windower = Windower(config_of("x", late=late))
    windower.add(at(0.5))
    windower.add(at(2.5))
    windower.add(at(0.7, 2.6))
    assert hours_of(closed(windower, at_end=True)) == expected
    assert windower.counts.late == 1


def test_empty_windows_are_passed_and_counted() -> None:
    windower = Windower(config_of("x"))
    windower.add(at(0.5, 7.5, 9.5))
    assert hours_of(closed(windower, at_end=True)) == [(0, 1), (7, 1), (9, 1)]
    assert windower.counts.empty_windows == 6 + 1


def test_a_declared_end_leaves_later_events_out() -> None:
    windower = Windower(config_of("x", end="2023-11-15T01:00"))
    end = (windower.config.end_seconds or 0) - START
    assert end > 0
    windower.add(at(end / HOUR - 0.5))
    assert not windower.has_ended
    windower.add(at(end / HOUR - 0.1, end / HOUR, end / HOUR + 3))
    assert windower.has_ended and windower.counts.after_end == 2
    assert sum(len(window.events) for window in closed(windower, at_end=True)) == 2


@pytest.mark.parametrize(
    ("length", "second", "start"),
    [
        ("week", "2026-02-01T23:59:59", "2026-01-26"),
        ("week", "2026-02-02T00:00:00", "2026-02-02"),
        ("day", "2026-02-02T13:00:00", "2026-02-02"),
        ("hour", "2026-02-02T13:59:59", "2026-02-02T13"),
        ("minute", "1970-01-01T00:00:59", "1970-01-01"),
        ("week", "1970-01-01T00:00:00", "1969-12-29"),
    ],
)
def test_windows_lie_where_the_calendar_puts_them(length: Any, second: str, start: str) -> None:
    config = config_of("x", window_length=length)
    seconds = int(np.datetime64(second, "s").astype(np.int64))
    assert np.datetime64(config.start_of(config.window_of(seconds)), "s") == np.datetime64(start, "s")


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 120), max_size=6), seed=st.integers(0, 99))
def test_how_files_cut_an_ordered_stream_does_not_matter(cuts: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    seconds = np.sort(START + random.integers(0, 9 * HOUR, 120))
    events = Events(random.integers(0, 5, 120), np.arange(120), seconds, np.zeros(120, dtype=np.int32))
    results = []
    for bounds in ([0, 120], sorted({0, 120, *cuts})):
        windower, found = Windower(config_of("x")), []
        for first, last in pairwise(bounds):
            windower.add(events.at(np.arange(first, last)))
            found += closed(windower)
        found += closed(windower, at_end=True)
        assert sum(len(window.events) for window in found) == 120
        results.append([(w.start, w.events.users.tolist(), w.events.items.tolist()) for w in found])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"end": "soon"}, "end: got soon, expected an ISO date"),
        ({"user_column": "x", "item_column": "x"}, "expected different names"),
        ({"window_length": "year"}, "window_length"),
        ({"num_items": 0}, "num_items"),
        ({"lateness_seconds": -1}, "lateness_seconds"),
    ],
)
def test_settings_that_mean_nothing(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StreamConfig(**{"path": "x", "num_items": 5, **values})
