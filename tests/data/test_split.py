"""The split against the plain definition, sequence by sequence."""

from __future__ import annotations

import numpy as np
import pytest

from hstu_dist.data.split import Split, part_lengths, split_rows

LENGTHS = np.array([0, 1, 2, 3, 4, 5, 9, 20])


def events_of(split: Split, n: int) -> list[int]:
    """Which events of a sequence of n belong to a split: written from the definition, one sequence at a time."""
    events = list(range(n))
    test = events[-1:] if n >= 2 else []
    validation = events[-2:-1] if n >= 3 else []
    training = [event for event in events if event not in test + validation]
    if split is Split.TRAIN:
        return training
    if split is Split.VALIDATION:
        return training + validation if validation else []
    if split is Split.TEST:
        return events if test else []
    return training + validation


@pytest.mark.parametrize("split", list(Split))
def test_parts_follow_the_definition(split: Split) -> None:
    assert part_lengths(LENGTHS, split).tolist() == [len(events_of(split, n)) for n in LENGTHS]


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("max_length", [1, 3, 100])
def test_rows_are_the_most_recent_inputs(split: Split, max_length: int) -> None:
    rows = split_rows(LENGTHS, split, max_length)
    got = {
        int(s): list(range(start, start + n))
        for s, start, n in zip(rows.sequences, rows.starts, rows.lengths, strict=True)
    }
    expected = {s: events_of(split, n)[:-1][-max_length:] for s, n in enumerate(LENGTHS)}
    assert got == {s: inputs for s, inputs in expected.items() if inputs}


def test_no_sequences() -> None:
    rows = split_rows(np.zeros(0, dtype=np.int64), Split.TEST, 5)
    assert len(rows.sequences) == len(rows.starts) == len(rows.lengths) == 0
