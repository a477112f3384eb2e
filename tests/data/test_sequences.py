"""Sequences against a slow, plain construction, and the cleaning rules."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_dist.data.config import Duplicates
from hstu_dist.data.duckdb_engine import DuckDBEngine
from hstu_dist.data.events import EventTable, Origin
from hstu_dist.data.flat_columns import EVENT, FlatColumns
from hstu_dist.data.sequences import Cleaning, Log
from hstu_dist.data.sequences import build_sequences as build
from hstu_dist.data.staging import stage
from hstu_dist.data.vocabulary import Vocabulary
from hstu_dist.data.workspace import workspace
from hstu_dist.data.writer import Sequences
from hstu_dist.errors import UserError

Event = tuple[Any, Any, int]


def table_of(events: list[Event]) -> EventTable:
    users, items, times = zip(*events, strict=True)
    text = pa.large_string()
    return EventTable(
        users=pa.array(users, text if isinstance(users[0], str) else pa.int64()),
        items=pa.array(items, text if isinstance(items[0], str) else pa.int64()),
        order_times=np.array(times, dtype=np.int64),
        per_second=1000,
        actions=np.arange(len(events), dtype=np.int32),
        origin=Origin(files=("a.csv", "b.csv"), starts=(0, 3)),
    )


def build_sequences(events: EventTable, cleaning: Cleaning, memory: int = 1 << 30) -> Sequences:
    """Through files and queries, as `prepare` does it."""
    with tempfile.TemporaryDirectory() as folder, workspace(Path(folder) / "work", {}) as work:
        events_folder, scratch = Path(folder) / "events", Path(folder) / "scratch"
        for created in (events_folder, scratch):
            created.mkdir()
        log = Log(folder=events_folder, staged=stage(events, events_folder, memory), origin=events.origin)
        with DuckDBEngine(1 << 30, scratch) as engine:
            users, items, *files, columns = build(log, cleaning, engine, work)
        flat = FlatColumns(columns)
        arrays = {"offsets": flat.offsets.copy(), **{name: flat.events[name].copy() for name in EVENT.names or ()}}
        rows = pa.concat_tables([pq.read_table(file) for file in files])
        for name in ("item_ids", "timestamps", "actions"):
            assert rows[name].combine_chunks().flatten().to_pylist() == arrays[name].tolist()
        assert rows["user_id"].to_pylist() == list(range(len(arrays["offsets"]) - 1))
        vocabularies = {"users": Vocabulary.users(users.parent), "items": Vocabulary.items(items.parent)}
        assert vocabularies["users"].counts.tolist() == np.diff(arrays["offsets"]).tolist()
        counts = np.bincount(arrays["item_ids"], minlength=len(vocabularies["items"]))
        assert vocabularies["items"].counts.tolist() == counts.tolist()
        return Sequences(**{name: vocabulary.raw for name, vocabulary in vocabularies.items()}, **arrays)


def as_dict(sequences: Sequences) -> dict[Any, list[tuple[Any, int, int]]]:
    """Raw user → (raw item, seconds, number of the event in the log)."""
    result = {}
    for u, user in enumerate(sequences.users.to_pylist()):
        rows = slice(sequences.offsets[u], sequences.offsets[u + 1])
        items = sequences.items.take(pa.array(sequences.item_ids[rows])).to_pylist()
        result[user] = list(zip(items, sequences.timestamps[rows], sequences.actions[rows], strict=True))
    return result


def plainly(events: list[Event]) -> dict[Any, list[tuple[Any, int, int]]]:
    by_user: dict[Any, list[tuple[int, int, Any]]] = defaultdict(list)
    for row, (user, item, time) in enumerate(events):
        by_user[user].append((time, row, item))
    return {u: [(item, time // 1000, row) for time, row, item in sorted(by_user[u])] for u in sorted(by_user)}


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 6), st.integers(0, 3000)), min_size=1, max_size=40))
def test_sequences_equal_the_plain_construction(events: list[Event]) -> None:
    sequences = build_sequences(table_of(events), Cleaning())
    assert as_dict(sequences) == plainly(events)
    assert list(as_dict(sequences)) == sorted({user for user, _, _ in events})
    assert sequences.items.to_pylist() == sorted({item for _, item, _ in events})


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(
    "cleaning", [Cleaning(), Cleaning(duplicates=Duplicates.DROP, min_user_events=4, min_item_events=6)]
)
def test_many_passes_give_what_one_gives(text: bool, cleaning: Cleaning) -> None:
    rng = np.random.default_rng(2)
    users, items, times = rng.integers(-60, 60, 900), rng.integers(0, 90, 900), rng.integers(0, 40, 900)
    names = [f"{'é' * (user % 3)}{user}" if text else user for user in users.tolist()]
    table = table_of(list(zip(names, items.tolist(), times.tolist(), strict=True)))
    # bytes, of which a pass needs some for every event
    one, many = (build_sequences(table, cleaning, memory) for memory in (1 << 30, 20_000))
    for field in fields(Sequences):
        left, right = getattr(one, field.name), getattr(many, field.name)
        assert left.equals(right) if isinstance(left, pa.Array) else np.array_equal(left, right)


def test_repeats_are_counted_over_all_passes() -> None:
    events = [(user, 1, 5) for user in range(200)] + [(user, 1, 5) for user in range(199, -1, -1)]
    with pytest.raises(UserError, match=r"row 198: user 199, item 1, time 5 is there already \(200 such rows\)"):
        build_sequences(table_of(events), Cleaning(duplicates=Duplicates.ERROR), memory=20_000)


@pytest.mark.parametrize("minimum", [1, 2])
def test_repeats_are_seen_also_where_rare_events_are_left_out(minimum: int) -> None:
    events = [(1, 1, 5), (1, 1, 5), (2, 7, 1)]
    cleaning = Cleaning(duplicates=Duplicates.ERROR, min_item_events=minimum)
    with pytest.raises(UserError, match=r"a.csv row 2: user 1, item 1, time 5 is there already \(1 such rows\)"):
        build_sequences(table_of(events), cleaning)


def test_equal_times_keep_the_order_of_the_log() -> None:
    events = [(1, item, 5000) for item in (9, 3, 7, 1, 8)]
    assert [item for item, _, _ in as_dict(build_sequences(table_of(events), Cleaning()))[1]] == [9, 3, 7, 1, 8]


def test_full_resolution_orders_what_whole_seconds_cannot() -> None:
    events = [(1, 10, 1900), (1, 20, 1100)]
    assert as_dict(build_sequences(table_of(events), Cleaning()))[1] == [(20, 1, 1), (10, 1, 0)]


def test_text_ids_are_ordered_by_their_utf8() -> None:
    events = [("zoë", "b", 1), ("ada", "é", 2), ("10", "b", 3), ("9", "a", 4)]
    sequences = build_sequences(table_of(events), Cleaning())
    assert sequences.users.to_pylist() == ["10", "9", "ada", "zoë"]
    assert sequences.items.to_pylist() == ["a", "b", "é"]


REPEATED = [(1, 5, 100), (1, 6, 100), (2, 5, 100), (1, 5, 100), (1, 5, 101), (1, 5, 100)]


def test_duplicates_are_an_error_that_names_the_first() -> None:
    with pytest.raises(UserError, match=r"b.csv row 1: user 1, item 5, time 100 is there already \(2 such rows\)") as e:
        build_sequences(table_of(REPEATED), Cleaning(duplicates=Duplicates.ERROR))
    assert "data.duplicates=drop" in e.value.remedy


def test_duplicates_dropped_or_kept() -> None:
    dropped = as_dict(build_sequences(table_of(REPEATED), Cleaning(duplicates=Duplicates.DROP)))
    assert [row for _, _, row in dropped[1]] == [0, 1, 4] and [row for _, _, row in dropped[2]] == [2]
    kept = as_dict(build_sequences(table_of(REPEATED), Cleaning(duplicates=Duplicates.KEEP)))
    assert [row for _, _, row in kept[1]] == [0, 1, 3, 5, 4]


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    events=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 99)), min_size=1, max_size=60),
    limits=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_both_limits_hold_and_nothing_more_is_lost(events: list[Event], limits: tuple[int, int]) -> None:
    left = list(enumerate(events))
    before = -1
    while before != len(left):
        before = len(left)
        users = Counter(user for _, (user, _, _) in left)
        left = [(row, e) for row, e in left if users[e[0]] >= limits[0]]
        items = Counter(item for _, (_, item, _) in left)
        left = [(row, e) for row, e in left if items[e[1]] >= limits[1]]
    cleaning = Cleaning(min_user_events=limits[0], min_item_events=limits[1])
    if not left:
        with pytest.raises(UserError, match="no event is left"):
            build_sequences(table_of(events), cleaning)
        return
    sequences = build_sequences(table_of(events), cleaning)
    assert sorted(sequences.actions.tolist()) == [row for row, _ in left]
    assert np.unique(sequences.item_ids).tolist() == list(range(len(sequences.items)))
    assert (np.diff(sequences.offsets) >= limits[0]).all()
