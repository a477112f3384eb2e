"""Events of each item so far, in memory that is bounded also where items have no numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Popularity:
    """How often items were met.

    Attributes:
        events: [K] int64.
        ids: [K] int64, ascending, the item of each; None: 0 to K - 1.
    """

    events: Ints
    ids: Ints | None = None

    @classmethod
    def before_all(cls, num_items: int, numbered: bool) -> Popularity:
        """Of no event; `numbered`: items are 0 to num_items - 1."""
        if numbered:
            return cls(np.zeros(num_items, dtype=np.int64))
        nothing = np.empty(0, dtype=np.int64)
        return cls(nothing, nothing)

    def plus(self, items: Ints, most: int) -> Popularity:
        """After further events of `items`; of items without numbers the `most` that were met most are kept."""
        if self.ids is None:
            return Popularity(self.events + np.bincount(items, minlength=len(self.events)))
        new, counts = np.unique(items, return_counts=True)
        ids, places = np.unique(np.concatenate((self.ids, new)), return_inverse=True)
        events = np.zeros(len(ids), dtype=np.int64)
        np.add.at(events, places, np.concatenate((self.events, counts)))
        if len(ids) > most:
            kept = np.sort(np.argsort(-events, kind="stable")[:most])
            ids, events = ids[kept], events[kept]
        return Popularity(events, ids)

    def arrays(self) -> dict[str, Ints]:
        """By name, as `of` takes them."""
        ids = {} if self.ids is None else {"popularity_ids": self.ids}
        return {"popularity": self.events, **ids}

    @classmethod
    def of(cls, arrays: dict[str, npt.NDArray[np.int64]]) -> Popularity:
        """Takes what `arrays` gave out of a dictionary."""
        return cls(arrays.pop("popularity"), arrays.pop("popularity_ids", None))
