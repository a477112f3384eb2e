"""Splits by time against the plain definition, sequence by sequence, however small the parts that are read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hstu_dist.commands.session import retrieval_moments
from hstu_dist.config import compose
from hstu_dist.data import time_split
from hstu_dist.data.config import LoaderConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.loader import BatchLoader, popularity
from hstu_dist.data.split import Moments, Split
from hstu_dist.data.time_split import moments_of, own_action_rows
from hstu_dist.errors import UserError
from hstu_dist.models.config import RetrievalConfig
from tests.data.cases import dataset_of

LENGTHS = [0, 1, 5, 0, 3, 40, 2, 2, 7, 1, 0]
TRAINING = (Split.TRAIN, Split.TRAIN_VALIDATION)


def interleaved(spread: int) -> SequenceDataset:
    """Users who overlap in time, with equal times within and between them."""
    data = dataset_of(LENGTHS)
    random = np.random.default_rng(spread)
    times = random.integers(0, spread, len(data.timestamps))
    for first, after in zip(data.offsets, data.offsets[1:], strict=False):
        times[first:after].sort()
    return replace(data, timestamps=times)


@pytest.fixture(params=[1, 7, 1 << 22])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(time_split, "_EVENTS_AT_ONCE", request.param)
    return int(request.param)


@pytest.mark.parametrize("spread", [1, 9, 2**40])
@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.4, 0.5), (0.01, 0.01)])
def test_moments_are_quantiles(parts: int, spread: int, shares: tuple[float, float]) -> None:
    data = interleaved(spread)
    ordered = np.sort(data.timestamps)
    last = len(ordered) - 1
    expected = Moments(int(ordered[int((1 - sum(shares)) * last)]), int(ordered[int((1 - shares[1]) * last)]))
    assert moments_of(data, *shares) == expected


def targets(data: SequenceDataset, moments: Moments, split: Split) -> dict[int, tuple[list[int], int]]:
    """Sequence → inputs and target, as places in the data set: written from the definition."""
    low = {Split.VALIDATION: moments.train_until, Split.TEST: moments.validate_until}.get(split)
    high = {Split.TRAIN: moments.train_until, Split.TEST: 2**62}.get(split, moments.validate_until)
    found = {}
    for sequence, (first, after) in enumerate(zip(data.offsets, data.offsets[1:], strict=False)):
        events = [e for e in range(first, after) if data.timestamps[e] <= high]
        if low is not None:
            later = [e for e in events if data.timestamps[e] > low]
            events = [e for e in events if data.timestamps[e] <= low] + later[:1] if later else []
        if len(events) >= 2:
            found[sequence] = (events[:-1], events[-1])
    return found


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("spread", [2, 30, 2**40])
def test_batches_hold_what_came_before_the_first_event_of_a_part(parts: int, spread: int, split: Split) -> None:
    data = interleaved(spread)
    moments = moments_of(data, 0.2, 0.3)
    expected = targets(data, moments, split)
    loader = BatchLoader(data, LoaderConfig(split=split, global_batch_size=3, max_length=6, cut=moments))
    got = {}
    for batch in loader.epoch(0):
        for row, first, after in zip(batch.row_ids.tolist(), batch.offsets, batch.offsets[1:], strict=False):
            got[row] = (batch.actions[first:after].tolist(), int(batch.target_ids[after - 1]))
    assert got == {row: (inputs[-6:], int(data.item_ids[target])) for row, (inputs, target) in expected.items()}
    if split in TRAINING:
        until = moments.until(split)
        counts = np.bincount(data.item_ids[data.timestamps <= until], minlength=data.num_items)
        assert popularity(data, split, moments).tolist() == counts.tolist()


@pytest.mark.parametrize("split", list(Split))
def test_ranking_rows_end_with_a_part(parts: int, split: Split) -> None:
    data = interleaved(30)
    moments = moments_of(data, 0.2, 0.3)
    until, before = moments.until(split), moments.before(split)
    rows = own_action_rows(data, moments, split, 4)
    got = zip(rows.sequences.tolist(), rows.starts.tolist(), rows.lengths.tolist(), strict=True)
    expected = []
    for sequence, (first, after) in enumerate(zip(data.offsets, data.offsets[1:], strict=False)):
        times = data.timestamps[first:after]
        inside = times if until is None else times[times <= until]
        if (inside > before).any():
            start = max(0, len(inside) - 4)
            expected.append((sequence, start, len(inside) - start))
    assert list(got) == expected


def test_a_part_without_anything_to_predict_is_refused() -> None:
    data = replace(dataset_of([3, 3]), timestamps=np.array([1, 2, 3, 7, 8, 9]))
    with pytest.raises(UserError, match=r"data set test: its validation part by time has nothing to predict"):
        retrieval_moments(data, RetrievalConfig(split="time", validation_share=0.3, test_share=0.2))
    assert retrieval_moments(data, RetrievalConfig()) is None


def test_shares_leave_something_to_train_on() -> None:
    with pytest.raises(UserError, match=r"validation_share \+ test_share: got 1\.2, expected less than 1"):
        compose(["experiment=ml1m", "task.split=time", "task.validation_share=0.6", "task.test_share=0.6"])


def test_own_actions_need_moments() -> None:
    with pytest.raises(ValueError, match="targets: got own without moments"):
        LoaderConfig(split=Split.TRAIN, global_batch_size=1, targets="own")
