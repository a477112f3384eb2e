"""The most recent events of the users seen last, in memory that is bounded; no loop over users or events."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from hstu_dist.data.stochastic_length import spans
from hstu_dist.data.stream.reading import Events

Ints = npt.NDArray[np.int64]

BYTES_PER_EVENT = 20
BYTES_PER_USER = 24


@dataclass(frozen=True, kw_only=True)
class UserEvents:
    """Events of U users laid end to end; user u owns events offsets[u] to offsets[u+1].

    Attributes:
        users: [U] int64 keys, ascending.
        offsets: [U+1] int64.
        items: [E] int64, as of `Events`.
        seconds: [E] int64 since 1970.
        actions: [E] int32.
    """

    users: Ints
    offsets: Ints
    items: Ints
    seconds: Ints
    actions: npt.NDArray[np.int32]

    @classmethod
    def of(cls, events: Events) -> UserEvents:
        """Of events that are in order of their users."""
        first = np.flatnonzero(np.diff(events.users, prepend=events.users[:1] - 1))
        return cls(
            users=events.users[first],
            offsets=np.append(first, len(events)).astype(np.int64),
            items=events.items,
            seconds=events.seconds,
            actions=events.actions,
        )

    @property
    def lengths(self) -> Ints:
        """[U] int64."""
        return np.diff(self.offsets)

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return len(self.users) * BYTES_PER_USER + len(self.items) * BYTES_PER_EVENT

    def arrays(self) -> dict[str, npt.NDArray[np.int64] | npt.NDArray[np.int32]]:
        """Every array by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def last(self, rows: Ints, lengths: Ints) -> UserEvents:
        """The last `lengths` events of some users (ascending rows)."""
        events = spans(self.offsets[rows + 1] - lengths, lengths)
        return UserEvents(
            users=self.users[rows],
            offsets=np.concatenate(([0], np.cumsum(lengths))),
            items=self.items[events],
            seconds=self.seconds[events],
            actions=self.actions[events],
        )


@dataclass(frozen=True)
class WindowEvents:
    """A window's users with their histories.

    Attributes:
        events: each user's history and after it the user's events of the window.
        history: [U] int64, how many events of each user are history.
    """

    events: UserEvents
    history: Ints


class Histories:
    """What is known of users before the window that comes next."""

    def __init__(self, max_length: int, max_bytes: int, kept: UserEvents | None = None) -> None:
        """Keeps the last `max_length` events a user and `max_bytes` in all; `kept` from an earlier `kept`."""
        self.max_length = max_length
        self.max_bytes = max_bytes
        nothing = Events.join([])
        self.kept = UserEvents.of(nothing) if kept is None else kept
        self.evicted = 0

    def advance(self, events: Events) -> WindowEvents:
        """Joins a window's events (by user, then time) to the histories, and makes them part of these.

        Memory for a second copy of the histories is needed meanwhile.
        """
        new = UserEvents.of(events)
        found = _rows_of(new.users, self.kept.users)
        known = found >= 0
        history = np.zeros(len(new.users), dtype=np.int64)
        history[known] = self.kept.lengths[found[known]]
        joined = _joined(self.kept, found, new)
        self._replace(joined, found[known])
        return WindowEvents(joined, history)

    def _replace(self, joined: UserEvents, replaced: Ints) -> None:
        """Users of the window in place of what was kept of them; then whoever was not seen longest leaves."""
        untouched = np.ones(len(self.kept.users), dtype=np.bool_)
        untouched[replaced] = False
        rows = np.flatnonzero(untouched)
        others, mine = self.kept, np.arange(len(joined.users))
        lengths = np.concatenate((others.lengths[rows], np.minimum(joined.lengths, self.max_length)))
        seen = np.concatenate((others.seconds[others.offsets[rows + 1] - 1], joined.seconds[joined.offsets[1:] - 1]))
        stays = self._fits(lengths, seen, np.concatenate((others.users[rows], joined.users)))
        from_others, from_joined = stays[: len(rows)], stays[len(rows) :]
        rows, mine = rows[from_others], mine[from_joined]
        self.kept = _merged(
            others.last(rows, others.lengths[rows]),
            joined.last(mine, np.minimum(joined.lengths[mine], self.max_length)),
        )

    def _fits(self, lengths: Ints, seen: Ints, users: Ints) -> npt.NDArray[np.bool_]:
        """Which users stay: those seen last, as many as there are bytes for."""
        sizes = lengths * BYTES_PER_EVENT + BYTES_PER_USER
        stays = np.ones(len(sizes), dtype=np.bool_)
        if sizes.sum() > self.max_bytes:
            # by key where times are equal, so that a restart decides alike
            order = np.lexsort((users, -seen))
            stays[order] = np.cumsum(sizes[order]) <= self.max_bytes
            self.evicted += int((~stays).sum())
        return stays


def _rows_of(users: Ints, known: Ints) -> Ints:
    """[U] where each user is among the ascending `known`; -1: nowhere."""
    if not len(known):
        return np.full(len(users), -1, dtype=np.int64)
    places = np.minimum(np.searchsorted(known, users), len(known) - 1)
    return np.where(known[places] == users, places, -1)


def _joined(kept: UserEvents, found: Ints, new: UserEvents) -> UserEvents:
    """Of the users of `new`, what was kept of them (rows `found`, -1: nothing) and the new events after it."""
    known = np.flatnonzero(found >= 0)
    old = found[known]
    before = np.zeros(len(new.users), dtype=np.int64)
    before[known] = kept.lengths[old]
    offsets = np.concatenate(([0], np.cumsum(before + new.lengths)))
    to_old, to_new = spans(offsets[known], before[known]), spans(offsets[:-1] + before, new.lengths)
    from_old = spans(kept.offsets[old], before[known])
    columns = {}
    for name in ("items", "seconds", "actions"):
        source, column = getattr(kept, name), getattr(new, name)
        columns[name] = np.empty(int(offsets[-1]), dtype=column.dtype)
        columns[name][to_old] = source[from_old]
        columns[name][to_new] = column
    return UserEvents(users=new.users, offsets=offsets, **columns)


def _merged(a: UserEvents, b: UserEvents) -> UserEvents:
    """All users of both, who have none in common."""
    users = np.concatenate((a.users, b.users))
    order = np.argsort(users, kind="stable")
    lengths = np.concatenate((a.lengths, b.lengths))
    starts = np.concatenate((a.offsets[:-1], b.offsets[:-1] + len(a.items)))
    events = spans(starts[order], lengths[order])
    return UserEvents(
        users=users[order],
        offsets=np.concatenate(([0], np.cumsum(lengths[order]))),
        items=np.concatenate((a.items, b.items))[events],
        seconds=np.concatenate((a.seconds, b.seconds))[events],
        actions=np.concatenate((a.actions, b.actions))[events],
    )
