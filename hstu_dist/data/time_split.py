"""Splits by time: two moments cut the events of all users, which is exact and reads the data set part by part.

For retrieval, a user's first event after a moment is the target and what the user did before is the history, so a
user has at most one target in validation and one in test, and nobody's future is trained on. A part that holds one
event gives no row, as in leave-one-out.

For ranking, every event is a row whose target is its own action, also the first of a sequence. In validation and test
the rows that count are those of the events after the moment.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hstu_dist.data.dataset import Ints, SequenceDataset
from hstu_dist.data.split import Moments, Rows, Split

_EVENTS_AT_ONCE = 1 << 22
_BUCKETS = 1 << 16


def moments_of(dataset: SequenceDataset, validation_share: float, test_share: float) -> Moments:
    """Moments that leave the latest shares of all events to validation and test; equal times stay together.

    Args:
        dataset: at least one event.
        validation_share: of all events.
        test_share: of all events.
    """
    last = len(dataset.timestamps) - 1
    train, validation = (
        _smallest(dataset, int(share * last)) for share in (1 - validation_share - test_share, 1 - test_share)
    )
    return Moments(train, validation)


def first_events(dataset: SequenceDataset, moments: Moments, split: Split) -> Ints:
    """How many of each sequence's first events belong to a retrieval split, its target included.

    Returns:
        [S] int64; in validation and test 0 for sequences without an event in that part.
    """
    until = moments.until(split)
    ends = dataset.lengths if until is None else events_until(dataset, until)
    if split in (Split.TRAIN, Split.TRAIN_VALIDATION):
        return ends
    history = events_until(dataset, moments.before(split))
    parts: Ints = np.where(ends > history, history + 1, 0)
    return parts


def own_action_rows(dataset: SequenceDataset, moments: Moments, split: Split, max_length: int) -> Rows:
    """The rows of a ranking split, sequences cut to their most recent `max_length` events.

    Args:
        dataset: the data.
        moments: where time is cut.
        split: which part.
        max_length: > 0.
    """
    until = moments.until(split)
    ends = dataset.lengths if until is None else events_until(dataset, until)
    history = events_until(dataset, moments.before(split))
    sequences = np.flatnonzero(ends > history).astype(np.int64)
    ends = ends[sequences]
    starts = np.maximum(ends - max_length, 0)
    return Rows(sequences=sequences, starts=starts, lengths=ends - starts)


def events_until(dataset: SequenceDataset, moment: int) -> Ints:
    """[S] int64, events of each sequence up to a moment."""
    counts = np.zeros(dataset.num_sequences, dtype=np.int64)
    offsets = dataset.offsets
    first = 0
    while first < dataset.num_sequences:
        # whole sequences, at least one
        after = int(np.searchsorted(offsets, offsets[first] + _EVENTS_AT_ONCE, side="right")) - 1
        after = max(after, first + 1)
        sums = np.cumsum(dataset.timestamps[offsets[first] : offsets[after]] <= moment)
        cuts = np.concatenate(([0], sums))[offsets[first : after + 1] - offsets[first]]
        counts[first:after] = np.diff(cuts)
        dataset.forget_pages()
        first = after
    return counts


def _smallest(dataset: SequenceDataset, rank: int) -> int:
    """The timestamp that `rank` timestamps precede in their order; found by counting, in buckets that get smaller."""
    low = min(int(times.min()) for times in _timestamps(dataset))
    high = max(int(times.max()) for times in _timestamps(dataset))
    while low < high:
        width = (high - low) // _BUCKETS + 1
        counts = np.zeros(_BUCKETS, dtype=np.int64)
        for times in _timestamps(dataset):
            inside = times[(times >= low) & (times <= high)]
            counts += np.bincount((inside - low) // width, minlength=_BUCKETS)
        ends = np.cumsum(counts)
        bucket = int(np.searchsorted(ends, rank, side="right"))
        rank -= int(ends[bucket - 1]) if bucket else 0
        low += bucket * width
        high = min(high, low + width - 1)
    return low


def _timestamps(dataset: SequenceDataset) -> Iterator[Ints]:
    for first in range(0, len(dataset.timestamps), _EVENTS_AT_ONCE):
        yield dataset.timestamps[first : first + _EVENTS_AT_ONCE]
        dataset.forget_pages()
