"""Examples of a window: every new event is a target once, with the events right before it, at any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu_dist.batch import JaggedBatch
from hstu_dist.data.config import BatchingConfig, EmissionConfig, LoaderConfig
from hstu_dist.data.loader import Shard
from hstu_dist.data.split import Split
from hstu_dist.data.stream.archive import Archive
from hstu_dist.data.stream.loader import WindowLoader
from tests.data.stream.cases import MAX_LENGTH, config_of, drain, events_of, pipeline_of, write_stream

HOURS = 7


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    folder = tmp_path_factory.mktemp("stream")
    pipeline = pipeline_of(config_of(write_stream(folder / "files", events_of(HOURS))), folder)
    assert len(drain(pipeline)) == HOURS
    return pipeline.archive


def loader_of(archive: Archive, shard: Shard | None = None, **settings: Any) -> WindowLoader:
    values: dict[str, Any] = {"global_batch_size": 3, "max_length": MAX_LENGTH, "seed": 5, **settings}
    return WindowLoader(archive, LoaderConfig(split=Split.TRAIN, **values), shard)


def targets_of(batches: list[JaggedBatch]) -> list[tuple[int, tuple[int, ...]]]:
    """Each trained target's event number, and the numbers of the inputs that it may see."""
    found = []
    for batch in batches:
        assert batch.trained is not None
        for b in range(batch.num_sequences):
            first, end = int(batch.offsets[b]), int(batch.offsets[b + 1])
            numbers = batch.actions[first:end].tolist()
            for row in range(first, end):
                if batch.trained[row]:
                    found.append((row - first, numbers, batch.target_ids[row], batch.query_times[row]))
    return [(int(target), tuple(numbers[: place + 1])) for place, numbers, target, _ in found]


def test_each_new_event_is_a_target_once_after_the_events_before_it(archive: Archive) -> None:
    events = events_of(HOURS)
    items = np.concatenate([part.items for part in events])
    users = np.concatenate([part.users for part in events])
    loader = loader_of(archive)
    offset = 0
    several = 0
    for window in range(HOURS):
        expected = []
        new = range(offset, offset + len(events[window]))
        for number in new:
            before = [n for n in range(number) if users[n] == users[number]]
            if before:
                expected.append((int(items[number]), before))
        offset += len(events[window])
        found = targets_of(list(loader.epoch(window)))
        assert len(found) == len(expected)
        # what is seen are the events right before the target, the model's length of them or at least half of it
        remaining = {(target, tuple(before)): 0 for target, before in expected}
        for target, seen in found:
            match = [key for key in remaining if key[0] == target and key[1][len(key[1]) - len(seen) :] == seen]
            assert len(match) == 1
            (key,) = match
            remaining[key] += 1
            assert min(len(key[1]), MAX_LENGTH // 2) <= len(seen) <= MAX_LENGTH
        assert set(remaining.values()) <= {1}
        several += sum(batch.num_sequences for batch in loader.epoch(window)) - len(loader.open(window).history)
    assert several > 0


def rows(batches: list[JaggedBatch]) -> dict[int, tuple[list[Any], ...]]:
    found = {}
    for batch in batches:
        assert batch.trained is not None
        for b, row in enumerate(batch.row_ids.tolist()):
            part = slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
            columns = (
                batch.item_ids,
                batch.timestamps,
                batch.actions,
                batch.target_ids,
                batch.query_times,
                batch.trained,
            )
            assert row not in found
            found[row] = tuple(column[part].tolist() for column in columns)
    return found


@pytest.mark.parametrize(
    "settings",
    [{}, {"batching": BatchingConfig(by="tokens", budget=20)}, {"emission": EmissionConfig(share=0.5)}],
)
def test_ranks_together_have_the_batches_of_one_and_resume_anywhere(archive: Archive, settings: dict[str, Any]) -> None:
    alone = loader_of(archive, **settings)
    ranks = [loader_of(archive, Shard(rank=rank, world_size=3), **settings) for rank in range(3)]
    for window in (2, 5):
        whole = list(alone.epoch(window))
        shares = [list(rank.epoch(window)) for rank in ranks]
        assert {len(share) for share in shares} == {len(whole)} == {len(alone)}
        for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
            assert rows([batch]) == rows(list(parts))
        for first in range(len(whole) + 1):
            assert [rows([b]) for b in alone.epoch(window, first)] == [rows([b]) for b in whole[first:]]
    assert rows(list(alone.epoch(2))) == rows(list(loader_of(archive, **settings).epoch(2)))
    order = [row for batch in alone.epoch(2) for row in batch.row_ids.tolist()]
    other = [row for batch in loader_of(archive, **{**settings, "seed": 6}).epoch(2) for row in batch.row_ids.tolist()]
    assert order != other


def test_evaluation_has_every_example_whatever_is_emitted(archive: Archive) -> None:
    loader = loader_of(archive, emission=EmissionConfig(share=0.1))
    everything = rows(list(loader_of(archive).epoch(3)))
    assert rows(list(loader.evaluation(3, batch_size=4))) == everything
    assert len(rows(list(loader.epoch(3)))) < len(everything) / 2


def test_a_window_of_new_users_only_has_no_batches(tmp_path: Path) -> None:
    one_each = events_of(1).pop()
    one_each = one_each.at(np.unique(one_each.users, return_index=True)[1])
    pipeline = pipeline_of(config_of(write_stream(tmp_path / "files", [one_each])), tmp_path)
    assert len(drain(pipeline)) == 1
    loader = loader_of(pipeline.archive)
    assert list(loader.epoch(0)) == [] and len(loader) == 0 and list(loader.evaluation(0, 8)) == []
