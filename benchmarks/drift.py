"""A stream whose items come and go: what a vocabulary of fixed size has to keep up with.

Items belong to topics and users to a few of these; within a topic some items are more popular than others. Every window
a share of the live items is replaced by new ones of the same topic and popularity, under ids that were never seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

Ints = npt.NDArray[np.int64]

_WINDOW_SECONDS = 3600
_FIRST_SECOND = 472_222 * _WINDOW_SECONDS
_TOPICS_OF_USER = 3
_STAYS = 0.8
"""How often the next event of a user is of the same topic."""


@dataclass(frozen=True)
class Period:
    """What happens in one window.

    Attributes:
        live: [L] int64 ids that can be met in it, ascending.
        users: [E] int64.
        items: [E] int64, each live.
        seconds: [E] int64, ascending.
    """

    live: Ints
    users: Ints
    items: Ints
    seconds: Ints


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The law of a stream.

    Attributes:
        windows: hours that it lasts.
        users: who are there all the time.
        events_a_user: in each window.
        topics: that items belong to.
        live: items at any time, a multiple of the topics.
        renewed: share of them that is replaced after each window.
        exponent: of Zipf's law of popularity within a topic.
    """

    windows: int
    users: int
    events_a_user: int
    topics: int
    live: int
    renewed: float
    exponent: float = 1.0

    def periods(self, seed: int) -> Iterator[Period]:
        """All windows, in order."""
        random = np.random.default_rng(seed)
        in_topic = self.live // self.topics
        weights = np.arange(1, in_topic + 1) ** -self.exponent
        shares = np.cumsum(weights / weights.sum())
        favourites = random.integers(self.topics, size=(self.users, _TOPICS_OF_USER))
        topic = favourites[:, 0]
        # the first ones are small numbers as of an old catalogue, later ones are beyond 32 bits
        ids, born = random.permutation(self.live) + 1, 0
        for window in range(self.windows):
            items = np.empty((self.events_a_user, self.users), dtype=np.int64)
            for turn in range(self.events_a_user):
                leaves = random.random(self.users) > _STAYS
                other = favourites[np.arange(self.users), random.integers(_TOPICS_OF_USER, size=self.users)]
                topic = np.where(leaves, other, topic)
                rank = np.searchsorted(shares, random.random(self.users)).clip(max=in_topic - 1)
                items[turn] = ids[topic * in_topic + rank]
            users = np.tile(np.arange(self.users), self.events_a_user)
            begin = _FIRST_SECOND + _WINDOW_SECONDS * window
            seconds = begin + np.arange(items.size) * _WINDOW_SECONDS // items.size
            yield Period(np.sort(ids), users, items.ravel(), seconds)
            ids = ids.copy()
            gone = random.choice(self.live, round(self.live * self.renewed), replace=False)
            ids[gone] = (1 << 40) + (born + np.arange(len(gone))) * 4093
            born += len(gone)


def play(periods: Sequence[Period], folder: Path, numbers: Numbers | None = None) -> None:
    """Writes a stream that has ended, and beside its files what `catalogue_of` names.

    Args:
        periods: what happens.
        folder: must not exist.
        numbers: that items have instead of their ids; None: ids are raw.
    """
    folder.mkdir(parents=True)
    for window, period in enumerate(periods):
        items = period.items if numbers is None else numbers(period.items)
        columns = {"user_id": period.users, "item_id": items, "timestamp": period.seconds}
        file = folder / f"window={window:04d}" / "events.parquet"
        file.parent.mkdir()
        pq.write_table(pa.table(columns), file)
    live = [period.live if numbers is None else numbers.own(period.live) for period in periods]
    np.save(catalogue_of(folder), np.stack(live))
    (folder / "_SUCCESS").touch()


def catalogue_of(folder: Path) -> Path:
    """The file of a played stream with the ids that live in each window, [windows, L] int64; -1: has no number."""
    # a name that a stream leaves alone
    return folder / "_catalogue.npy"


@dataclass(frozen=True)
class Numbers:
    """A vocabulary that was made once and never changes.

    Attributes:
        known: ids that have a number, ascending.
        complete: whether no other id comes; otherwise all others share one more number.
    """

    known: Ints
    complete: bool

    @classmethod
    def of_most(cls, periods: Sequence[Period], most: int) -> Numbers:
        """Of the ids that were met most in some periods."""
        ids, counts = np.unique(np.concatenate([period.items for period in periods]), return_counts=True)
        return cls(np.sort(ids[np.argsort(-counts, kind="stable")[:most]]), complete=False)

    @classmethod
    def of_all(cls, periods: Sequence[Period]) -> Numbers:
        """Of every id that ever lives."""
        return cls(np.unique(np.concatenate([period.live for period in periods])), complete=True)

    def __len__(self) -> int:
        """How many numbers there are."""
        return len(self.known) + (not self.complete)

    def __call__(self, ids: Ints) -> Ints:
        """The number of each id."""
        places = np.searchsorted(self.known, ids).clip(max=len(self.known) - 1)
        numbers: Ints = np.where(self.known[places] == ids, places, len(self.known))
        return numbers

    def own(self, ids: Ints) -> Ints:
        """The number of each id, -1 where it shares one."""
        numbers: Ints = np.where(np.isin(ids, self.known), self(ids), -1)
        return numbers
