"""Splitting as arithmetic on sequences; nothing is copied. Leave-one-out here, by time in `time_split`.

Leave-one-out: of a sequence of n events the last is the test target (n >= 2) and the last but one the validation target
(n >= 3); every other event is for training. So a sequence of 2 events trains on 1 and has no validation
target, and one of 1 event is training only.

A part of m events gives m - 1 rows: a row is an input event with the event that follows it as its target.
In validation and test the row that counts is the last one. A part of fewer than 2 events gives no rows,
and its sequence is left out of that split, in training too: it holds nothing to predict.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Split(StrEnum):
    """Which part of every sequence; `train_validation` is all but the test target, for a final refit."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"
    TRAIN_VALIDATION = "train_validation"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The R sequences that have rows in a split, and where their inputs lie.

    Attributes:
        sequences: [R] int64, ascending indices into the data set.
        starts: [R] int64, first input event, counted within the sequence.
        lengths: [R] int64 >= 1, number of inputs; the target of each is the event after it.

    The inputs are the most recent ones: `starts` is also how many earlier ones there are.
    """

    sequences: Ints
    starts: Ints
    lengths: Ints


def part_lengths(lengths: Ints, split: Split) -> Ints:
    """How many of each sequence's first events belong to the split, its target included.

    Args:
        lengths: [S] int64 >= 0, events of every sequence.
        split: for validation and test, sequences without a target give 0.

    Returns:
        [S] int64.
    """
    n = lengths
    match split:
        case Split.TRAIN:
            return np.where(n >= 3, n - 2, np.minimum(n, 1))
        case Split.VALIDATION:
            return np.where(n >= 3, n - 1, 0)
        case Split.TEST:
            return np.where(n >= 2, n, 0)
        case Split.TRAIN_VALIDATION:
            return np.where(n >= 2, n - 1, n)


def split_rows(lengths: Ints, split: Split, max_length: int) -> Rows:
    """The rows of a split, histories cut to their most recent `max_length` inputs.

    Args:
        lengths: [S] int64 >= 0, events of every sequence.
        split: which part of each.
        max_length: > 0.
    """
    return recent_rows(part_lengths(lengths, split), max_length)


def recent_rows(parts: Ints, max_length: int) -> Rows:
    """The rows of a split's parts of sequences, histories cut to their most recent `max_length` inputs.

    Args:
        parts: [S] int64 >= 0, how many of each sequence's first events belong to the split.
        max_length: > 0.
    """
    inputs = parts - 1
    sequences = np.flatnonzero(inputs >= 1).astype(np.int64)
    inputs = inputs[sequences]
    starts = np.maximum(inputs - max_length, 0)
    return Rows(sequences=sequences, starts=starts, lengths=inputs - starts)


@dataclass(frozen=True)
class Moments:
    """Where time is cut, for all users alike.

    Attributes:
        train_until: seconds of the last training events.
        validate_until: seconds of the last validation events; later ones are for testing.
    """

    train_until: int
    validate_until: int

    def before(self, split: Split) -> int:
        """Seconds up to which events are history only; -1: all events count."""
        match split:
            case Split.VALIDATION:
                return self.train_until
            case Split.TEST:
                return self.validate_until
            case Split.TRAIN | Split.TRAIN_VALIDATION:
                return -1

    def until(self, split: Split) -> int | None:
        """Seconds of the last events; None: there is no end."""
        match split:
            case Split.TRAIN:
                return self.train_until
            case Split.VALIDATION | Split.TRAIN_VALIDATION:
                return self.validate_until
            case Split.TEST:
                return None
