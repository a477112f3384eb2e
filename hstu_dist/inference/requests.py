"""Requests as arrays: histories and candidates of many users, checked, with unknown items dealt with; no torch.

Shapes: B requests, E events, M candidates.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hstu_dist.errors import UserError

Ints = npt.NDArray[np.int64]

UNKNOWN = -1
"""Dense id of an item that the model was not trained on."""

_LATEST = 1 << 62
"""Times from here on would overflow when they are subtracted."""


class RequestError(UserError):
    """A request that no score can be given for.

    Attributes:
        row: index of the request among those that were checked together.
        field: of the request that is wrong.
    """

    def __init__(self, row: int, field: str, problem: str, remedy: str = "") -> None:
        super().__init__(f"{field}: {problem}", remedy)
        self.row = row
        self.field = field

    def __reduce__(self) -> Any:
        return (type(self), (self.row, self.field, self.problem.removeprefix(f"{self.field}: "), self.remedy))


@dataclass(frozen=True, kw_only=True)
class Requests:
    """B requests laid end to end.

    Attributes:
        offsets: [B+1] int64, of events.
        item_ids: [E] int64, dense ids of the events' items, oldest first; UNKNOWN for items that the model has not.
        timestamps: [E] int64 seconds.
        actions: [E] int64, what the user did; 0 where nobody says.
        candidate_offsets: [B+1] int64.
        candidate_ids: [M] int64, dense ids; UNKNOWN as above.
        times: [B] int64 seconds, when each request is made.
        users: [B], whose histories they are, for the cache; None: nobody says, of one request or of all.
        contextual: [B, C] int64, codes of what is known of each user, UNKNOWN as above; None: nothing is.
        whole: items of the histories before they were cut, and their offsets [B+1]; None: they are as they came.
    """

    offsets: Ints
    item_ids: Ints
    timestamps: Ints
    actions: Ints
    candidate_offsets: Ints
    candidate_ids: Ints
    times: Ints
    users: Sequence[Hashable] | None = None
    contextual: Ints | None = None
    whole: tuple[Ints, Ints] | None = None

    @property
    def seen(self) -> tuple[Ints, Ints]:
        """Items of the histories as they came, and their offsets."""
        return self.whole or (self.item_ids, self.offsets)

    @property
    def count(self) -> int:
        """B."""
        return len(self.times)

    @classmethod
    def joined(cls, parts: Sequence[Requests]) -> Requests:
        """Several of one model as one, in order; at least one."""

        def offsets(of: Sequence[Ints]) -> Ints:
            return np.concatenate(([0], np.cumsum(np.concatenate([np.diff(x) for x in of]))))

        columns = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(cls)
            if field.name in ("item_ids", "timestamps", "actions", "candidate_ids", "times")
        }
        users = [user for part in parts for user in (part.users or [None] * part.count)]
        contextual = [part.contextual for part in parts if part.contextual is not None]
        return cls(
            offsets=offsets([part.offsets for part in parts]),
            candidate_offsets=offsets([part.candidate_offsets for part in parts]),
            users=users,
            contextual=np.concatenate(contextual) if contextual else None,
            whole=(np.concatenate([part.seen[0] for part in parts]), offsets([part.seen[1] for part in parts])),
            **columns,
        )

    def check(self) -> None:
        """Whether times make sense.

        Raises:
            RequestError: the first request whose times are negative, too large, descend, or lie after the request.
        """
        owners = np.repeat(np.arange(self.count), np.diff(self.offsets))
        before = np.concatenate(([0], self.timestamps[:-1])) if len(self.timestamps) else self.timestamps
        first = np.zeros(len(owners), dtype=bool)
        first[self.offsets[:-1][np.diff(self.offsets) > 0]] = True
        for bad, field, expected in (
            (self.timestamps < 0, "timestamps", "seconds since 1970"),
            (self.timestamps >= _LATEST, "timestamps", f"seconds below {_LATEST}"),
            ((self.timestamps < before) & ~first, "timestamps", "none before the one ahead of it; sort the events"),
            (self.timestamps > self.times[owners], "timestamps", "none after the time of the request"),
        ):
            if bad.any():
                event = int(bad.argmax())
                row = int(owners[event])
                place = event - int(self.offsets[row])
                raise RequestError(row, field, f"got {self.timestamps[event]} as event {place}, expected {expected}")
        late = (self.times < 0) | (self.times >= _LATEST)
        if late.any():
            row = int(late.argmax())
            raise RequestError(row, "time", f"got {self.times[row]}, expected seconds since 1970 below {_LATEST}")

    def known(self, policy: Literal["error", "skip"]) -> Requests:
        """The same without events of unknown items; unknown candidates stay.

        Args:
            policy: whether unknown items are refused or passed over.

        Raises:
            RequestError: the policy is error, and an item is unknown.
        """
        unknown = self.item_ids == UNKNOWN
        if policy == "error":
            _refuse(unknown, self.offsets, "item_ids")
            _refuse(self.candidate_ids == UNKNOWN, self.candidate_offsets, "candidates")
        return self._keep(~unknown) if unknown.any() else self

    def expect_history(self) -> None:
        """Whether every request has at least one event.

        Raises:
            RequestError: the first one that has none.
        """
        empty = np.diff(self.offsets) == 0
        if empty.any():
            problem = "got no events, expected at least one: the model scores by the last"
            raise RequestError(int(empty.argmax()), "item_ids", problem, "leave the request out, or set unknown=skip")

    def most_recent(self, events: int) -> Requests:
        """The same with histories cut to so many events at most, the last ones."""
        lengths = np.diff(self.offsets)
        if not (lengths > events).any():
            return self
        to_end = np.repeat(self.offsets[1:], lengths) - np.arange(len(self.item_ids))
        return replace(self._keep(to_end <= events), whole=self.seen)

    def _keep(self, kept: npt.NDArray[np.bool_]) -> Requests:
        return replace(
            self,
            offsets=np.concatenate(([0], np.cumsum(kept)))[self.offsets],
            item_ids=self.item_ids[kept],
            timestamps=self.timestamps[kept],
            actions=self.actions[kept],
        )


def _refuse(unknown: npt.NDArray[np.bool_], offsets: Ints, field: str) -> None:
    if unknown.any():
        place = int(unknown.argmax())
        row = int(np.searchsorted(offsets, place, side="right")) - 1
        raise RequestError(
            row,
            field,
            f"got an item at place {place - int(offsets[row])} that the model was not trained on",
            "leave it out, or set unknown=skip to pass over such items",
        )


class ValueIndex:
    """From raw values, such as ids of items, to dense ones and back, without building anything for each request."""

    def __init__(self, raw: Any) -> None:
        """Of different values in ascending order: an Arrow array of int64 or text."""
        self._raw = raw
        self.is_text = str(raw.type) != "int64"
        self._places: dict[str, int] = {}
        self._sorted = np.empty(0, dtype=np.int64)
        if self.is_text:
            self._places = {raw: place for place, raw in enumerate(raw.to_pylist())}
        else:
            self._sorted = raw.to_numpy(zero_copy_only=False)

    def __len__(self) -> int:
        """V."""
        return len(self._raw)

    def encode(self, raw: Sequence[int] | Sequence[str] | Ints) -> Ints:
        """Dense ids [n] int64 of raw values, UNKNOWN for those that are not there.

        Raises:
            ValueError: one is of another type.
        """
        if self.is_text:
            return np.array([self._places.get(text, UNKNOWN) for text in _texts(raw)], dtype=np.int64)
        values = raw if isinstance(raw, np.ndarray) else _integers(raw)
        places = np.searchsorted(self._sorted, values)
        found = self._sorted[np.minimum(places, len(self._sorted) - 1)] == values
        return np.where(found, places, UNKNOWN)

    def decode(self, ids: Ints) -> list[int] | list[str]:
        """Raw values of dense ids in [0, V)."""
        values: list[int] | list[str] = self._raw.take(ids).to_pylist()
        return values


def _integers(raw: Sequence[Any]) -> Ints:
    for value in raw:
        if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
            raise ValueError(f"got {value!r}, expected whole numbers, as the run's data has")
    return np.array(raw, dtype=np.int64)


def _texts(raw: Sequence[Any] | Ints) -> Iterator[str]:
    for value in raw:
        if not isinstance(value, str):
            raise ValueError(f"got {value!r}, expected text, as the run's data has")
        yield value
