"""What computes on staged events, and the statements it runs: one SQL for every engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from hstu_dist.data.staging import EVENT_COLUMNS

SIDES = {"users": "user_key", "items": "item_key"}
"""Name of a vocabulary and its column among the events."""


class Engine(Protocol):
    """Runs queries over Parquet files; a context manager, which gives its memory back."""

    def name_table(self, name: str, files: Sequence[Path]) -> None:
        """Let queries refer to the files, all of one schema, by a name; an earlier table of this name is forgotten."""

    def query(self, sql: str) -> Iterator[pa.RecordBatch]:
        """The rows of a query, in its order."""


def count_events(side: str, other: str | None, minimum: int) -> str:
    """Raw ids of a side in ascending order and how many events each has, if enough.

    Args:
        side: users or items.
        other: the other side, if only events of its ids in the table of that name count.
        minimum: events.
    """
    key = SIDES[side]
    join = "" if other is None else f"JOIN {other} o ON e.{SIDES[other]} = o.raw"
    return (
        f"SELECT e.{key} AS raw, count(*) AS count FROM events e {join} "
        f"GROUP BY e.{key} HAVING count(*) >= {minimum} ORDER BY raw"
    )


def distinct_events() -> str:
    """The first of the events of equal user, item and time."""
    return f"SELECT {', '.join(EVENT_COLUMNS)} FROM ({_numbered()}) n WHERE n.occurrence = 1"


def repeated_events() -> str:
    """How many events repeat the user, item and time of an earlier one, and the first that does."""
    return f"SELECT count(*) AS count, min(n.log_row) AS first FROM ({_numbered()}) n WHERE n.occurrence > 1"


def event_at(row: int) -> str:
    """User, item and time of a row of the log."""
    return f"SELECT user_key, item_key, event_time FROM events WHERE log_row = {row}"


def sorted_events(only_known_users: bool) -> str:
    """Events of known items in the order of their sequences: by user, then time, then as they came.

    Args:
        only_known_users: leave out users that are not in the table `users`.
    """
    join = "JOIN users u ON e.user_key = u.raw" if only_known_users else ""
    return (
        "SELECT i.id AS item_id, e.event_time, e.action, e.log_row "
        f"FROM part e JOIN items i ON e.item_key = i.raw {join} "
        "ORDER BY e.user_key, e.event_time, e.log_row"
    )


def _numbered() -> str:
    order = "PARTITION BY user_key, item_key, event_time ORDER BY log_row"
    return f"SELECT *, row_number() OVER ({order}) AS occurrence FROM part"
