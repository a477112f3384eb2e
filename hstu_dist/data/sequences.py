"""Events to per-user sequences: dense ids in order of the raw ones, times in order, ties as they came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hstu_dist.data.config import Duplicates
from hstu_dist.data.events import EventTable
from hstu_dist.errors import UserError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """Which events are kept; see EventsConfig."""

    duplicates: Duplicates = Duplicates.KEEP
    min_user_events: int = 1
    min_item_events: int = 1


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """U sequences of E events in all, laid end to end; user u owns events offsets[u] to offsets[u+1].

    Attributes:
        users: [U] Arrow int64 or large_string, the raw id of every dense one, ascending.
        items: [I] likewise.
        offsets: [U+1] int64.
        item_ids: [E] int64 in [0, I).
        timestamps: [E] int64 seconds, ascending within a user.
        actions: [E] int32.
    """

    users: pa.Array
    items: pa.Array
    offsets: Ints
    item_ids: Ints
    timestamps: Ints
    actions: npt.NDArray[np.int32]


def build_sequences(events: EventTable, cleaning: Cleaning) -> Sequences:
    """Clean, number and sort the events.

    Raises:
        UserError: duplicate events where they are not allowed, or no event is left.
    """
    users, user_codes = _dense(events.users)
    items, item_codes = _dense(events.items)
    kept = np.ones(len(user_codes), dtype=np.bool_)
    if cleaning.duplicates is not Duplicates.KEEP:
        repeats = _repeats(user_codes, item_codes, events.order_times)
        if cleaning.duplicates is Duplicates.ERROR and len(repeats):
            _reject_repeat(events, int(repeats.min()), len(repeats))
        kept[repeats] = False
    _drop_rare(kept, (user_codes, cleaning.min_user_events), (item_codes, cleaning.min_item_events))
    if not kept.any():
        raise UserError(
            f"no event is left: got {len(kept)} events, none of a user with {cleaning.min_user_events} and an item "
            f"with {cleaning.min_item_events} events",
            "lower data.min_user_events or data.min_item_events",
        )
    rows = np.flatnonzero(kept)
    users, user_codes = _renumber(users, user_codes[rows])
    items, item_codes = _renumber(items, item_codes[rows])
    # lexsort is stable: events of equal time stay in their original order
    order = np.lexsort((events.order_times[rows], user_codes))
    return Sequences(
        users=users,
        items=items,
        offsets=np.concatenate(([0], np.cumsum(np.bincount(user_codes, minlength=len(users))))).astype(np.int64),
        item_ids=item_codes[order],
        timestamps=events.seconds[rows][order],
        actions=events.actions[rows][order],
    )


def _dense(raw: pa.Array) -> tuple[pa.Array, Ints]:
    """The distinct values, ascending, and the position of every value among them."""
    encoded = raw.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return encoded.dictionary.take(pa.array(order)), rank[encoded.indices.to_numpy()]


def _renumber(values: pa.Array, codes: Ints) -> tuple[pa.Array, Ints]:
    """Leave out the values that no code refers to."""
    used = np.bincount(codes, minlength=len(values)) > 0
    return values.filter(pa.array(used)), (np.cumsum(used) - 1)[codes]


def _repeats(user_codes: Ints, item_codes: Ints, times: npt.NDArray[Any]) -> Ints:
    """Rows whose user, item and time an earlier row has too."""
    order = np.lexsort((times, item_codes, user_codes))
    same = np.ones(max(len(order) - 1, 0), dtype=np.bool_)
    for key in (user_codes, item_codes, times):
        same &= np.diff(key[order]) == 0
    return order[1:][same]


def _reject_repeat(events: EventTable, row: int, count: int) -> None:
    user, item = events.users[row].as_py(), events.items[row].as_py()
    raise UserError(
        f"{events.origin.locate(row)}: user {user!r}, item {item!r}, time {events.order_times[row]} is there already "
        f"({count} such rows)",
        "pass data.duplicates=drop or data.duplicates=keep",
    )


def _drop_rare(kept: npt.NDArray[np.bool_], *limits: tuple[Ints, int]) -> None:
    """Clear `kept` in place until every code that is left has at least its minimum of kept rows."""
    before = -1
    while before != (before := int(kept.sum())):
        for codes, minimum in limits:
            if minimum > 1:
                kept &= np.bincount(codes[kept], minlength=int(codes.max()) + 1)[codes] >= minimum
