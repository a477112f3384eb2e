"""The loader: every sequence once, the same batches however many ranks, resumable anywhere."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_dist.batch import JaggedBatch
from hstu_dist.data.config import BatchingConfig, LoaderConfig
from hstu_dist.data.loader import BatchLoader, Shard, popularity
from hstu_dist.data.split import Split, part_lengths, split_rows
from tests.data.cases import dataset_of

LENGTHS = [0, 1, 2, 3, 4, 5, 30, 7, 12, 3, 3, 2, 9, 1, 6, 11, 40]
# epoch 0 of seed 3; a stored (epoch, batch) means other data if this ever changes
FROZEN_ORDER = [4, 5, 6, 15, 12, 14, 16, 8, 7]


def loader_of(split: Split = Split.TRAIN, shard: Shard | None = None, **settings: Any) -> BatchLoader:
    defaults: dict[str, Any] = {"split": split, "global_batch_size": 4, "max_length": 8, "seed": 3}
    config = LoaderConfig(**(defaults | settings))
    return BatchLoader(dataset_of(LENGTHS), config, shard)


def assert_same(a: JaggedBatch, b: JaggedBatch) -> None:
    for field in fields(JaggedBatch):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert left is right is None or (left.dtype == right.dtype and torch.equal(left, right)), field.name


@pytest.mark.parametrize("split", list(Split))
def test_rows_hold_each_event_with_the_one_that_follows(split: Split) -> None:
    data = dataset_of(LENGTHS)
    seen = []
    for batch in loader_of(split).epoch(0):
        assert batch.offsets[0] == 0 and batch.offsets.dtype == torch.int64
        for b, sequence in enumerate(batch.row_ids.tolist()):
            rows = slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
            part = int(part_lengths(data.lengths, split)[sequence])
            events = np.arange(data.offsets[sequence], data.offsets[sequence] + part)
            inputs, targets = events[:-1][-8:], events[1:][-8:]
            assert batch.item_ids[rows].tolist() == data.item_ids[inputs].tolist()
            assert batch.timestamps[rows].tolist() == data.timestamps[inputs].tolist()
            assert batch.actions[rows].tolist() == data.actions[inputs].tolist()
            assert batch.target_ids[rows].tolist() == data.item_ids[targets].tolist()
            assert batch.query_times[rows].tolist() == data.timestamps[targets].tolist()
            seen.append(sequence)
        assert batch.num_tokens == int(batch.offsets[-1])
    assert sorted(seen) == split_rows(data.lengths, split, 8).sequences.tolist()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=40).filter(any),
    world_size=st.sampled_from([1, 2, 3, 4, 7]),
    size=st.integers(1, 9),
    split=st.sampled_from(list(Split)),
    shuffle=st.booleans(),
    balance=st.sampled_from(["none", "counts"]),
)
def test_ranks_together_see_each_global_batch_once(
    lengths: list[int], world_size: int, size: int, split: Split, shuffle: bool, balance: Literal["none", "counts"]
) -> None:
    data = dataset_of(lengths)
    batching = BatchingConfig(balance=balance)
    config = LoaderConfig(split=split, global_batch_size=size, max_length=5, shuffle=shuffle, batching=batching)
    whole = list(BatchLoader(data, config).epoch(2))
    ranks = [BatchLoader(data, config, Shard(rank=r, world_size=world_size)) for r in range(world_size)]
    assert {len(rank) for rank in ranks} == {len(whole)}
    for batch, shares in zip(whole, zip(*(rank.epoch(2) for rank in ranks), strict=True), strict=True):
        assert sorted(torch.cat([share.row_ids for share in shares]).tolist()) == sorted(batch.row_ids.tolist())
        assert sum(share.num_tokens for share in shares) == batch.num_tokens
        counts = [share.num_sequences for share in shares]
        assert max(counts) - min(counts) <= 1
    everything = [row for batch in whole for row in batch.row_ids.tolist()]
    assert sorted(everything) == split_rows(data.lengths, split, 5).sequences.tolist()


@pytest.mark.parametrize("world_size", [1, 3])
def test_resuming_anywhere_equals_never_stopping(world_size: int) -> None:
    shard = Shard(rank=world_size - 1, world_size=world_size)
    whole = list(loader_of(shard=shard).epoch(1))
    assert len(whole) == len(loader_of()) >= 3
    for first in range(len(whole) + 1):
        resumed = list(loader_of(shard=shard).epoch(1, first))
        assert len(resumed) == len(whole) - first
        for a, b in zip(resumed, whole[first:], strict=True):
            assert_same(a, b)


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(loader: BatchLoader, epoch: int) -> list[int]:
        return [row for batch in loader.epoch(epoch) for row in batch.row_ids.tolist()]

    assert order(loader_of(), 0) == order(loader_of(global_batch_size=3), 0)
    assert order(loader_of(), 0) != order(loader_of(), 1)
    assert order(loader_of(), 0) != order(loader_of(seed=4), 0)
    plain = order(loader_of(shuffle=False), 0)
    assert plain == sorted(plain) == order(loader_of(shuffle=False), 5)


def test_order_is_the_one_that_checkpoints_were_made_with() -> None:
    first = next(loader_of(global_batch_size=100).epoch(0))
    assert first.row_ids.tolist() == FROZEN_ORDER


def test_an_empty_share_is_a_batch() -> None:
    *_, last = loader_of(Split.TEST, Shard(rank=3, world_size=4), global_batch_size=13).epoch(0)
    assert (last.num_sequences, last.num_tokens, last.offsets.tolist()) == (0, 0, [0])
    assert last.item_ids.dtype == last.target_ids.dtype == torch.int64 and last.actions.dtype == torch.int32


def test_a_split_without_rows_has_no_batches() -> None:
    config = LoaderConfig(split=Split.TRAIN, global_batch_size=2)
    loader = BatchLoader(dataset_of([1, 2, 3]), config)
    assert len(loader) == 0 and list(loader.epoch(0)) == []


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match=r"first_batch: got 99, expected 0 to \d"):
        loader_of().epoch(0, 99)
    with pytest.raises(ValueError, match="epoch: got -1"):
        loader_of().epoch(-1)
    with pytest.raises(ValueError, match=r"Shard.rank: got 2, expected 0 <= rank < world_size = 2"):
        Shard(rank=2, world_size=2)


@pytest.mark.parametrize("split", [Split.TRAIN, Split.TRAIN_VALIDATION])
def test_popularity_counts_training_events(split: Split) -> None:
    data = dataset_of(LENGTHS)
    expected = np.zeros(data.num_items, dtype=np.int64)
    for sequence, part in enumerate(part_lengths(data.lengths, split)):
        start = data.offsets[sequence]
        np.add.at(expected, data.item_ids[start : start + part], 1)
    counts = popularity(data, split)
    assert counts.dtype == torch.int64 and counts.tolist() == expected.tolist()


def test_popularity_refuses_evaluation_splits() -> None:
    with pytest.raises(ValueError, match="expected train or train_validation"):
        popularity(dataset_of([5]), Split.TEST)
