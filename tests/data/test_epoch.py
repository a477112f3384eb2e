"""Batches of equal work, shared out evenly, of whole or cut sequences: each once an epoch, at any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_dist.batch import JaggedBatch
from hstu_dist.data.balance import CostLaw
from hstu_dist.data.config import BatchingConfig, LoaderConfig, StochasticLengthConfig
from hstu_dist.data.epoch import equal_cost_bounds
from hstu_dist.data.loader import BatchLoader, Shard
from hstu_dist.data.split import Split, part_lengths, split_rows
from hstu_dist.train.state import TrainState
from tests.data.cases import dataset_of

LENGTHS = [3, 9, 14, 60, 5, 5, 7, 33, 90, 41, 8, 6, 12, 4, 5, 55, 21, 10, 7, 70, 5, 6, 17, 28, 9, 11, 4, 6, 38, 90, 2]
DATA = dataset_of(LENGTHS)
LAW = CostLaw(linear=10.0, quadratic=0.25)
SHORTER = StochasticLengthConfig(alpha=1.3)
KINDS: dict[str, dict[str, Any]] = {
    "sequences": {},
    "sequences cut": {"stochastic_length": SHORTER},
    "windows": {"window": "random", "max_length": 20},
    "tokens": {"batching": BatchingConfig(by="tokens", budget=150, balance="none")},
    "tokens cut": {"batching": BatchingConfig(by="tokens", balance="counts"), "stochastic_length": SHORTER},
    "flops cut": {"batching": BatchingConfig(by="flops", budget=1500), "stochastic_length": SHORTER},
}


def loader_of(shard: Shard | None = None, **settings: Any) -> BatchLoader:
    values: dict[str, Any] = {
        "split": Split.TRAIN,
        "global_batch_size": 4,
        "max_length": 64,
        "seed": 3,
        "cost": LAW,
        **settings,
    }
    return BatchLoader(DATA, LoaderConfig(**values), shard)


def by_row(batches: Iterator[JaggedBatch]) -> dict[int, tuple[list[int], ...]]:
    """What each sequence looked like; refuses a second one."""
    found: dict[int, tuple[list[int], ...]] = {}
    for batch in batches:
        for b, row in enumerate(batch.row_ids.tolist()):
            part = slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
            assert row not in found
            columns = batch.item_ids, batch.timestamps, batch.actions, batch.target_ids, batch.query_times
            found[row] = tuple(column[part].tolist() for column in columns)
    return found


@pytest.mark.parametrize("selection", ["greedy", "random", "weighted"])
@pytest.mark.parametrize("split", [Split.TRAIN, Split.TRAIN_VALIDATION])
def test_a_cut_sequence_is_a_sequence_of_its_own(selection: Any, split: Split) -> None:
    law = StochasticLengthConfig(alpha=1.3, selection=selection)
    rows = split_rows(DATA.lengths, split, 64)
    whole_length = dict(zip(rows.sequences.tolist(), rows.lengths.tolist(), strict=True))
    found = by_row(loader_of(split=split, stochastic_length=law).epoch(0))
    assert sorted(found) == rows.sequences.tolist()
    cut = 0
    for row, (items, times, actions, targets, query_times) in found.items():
        whole = whole_length[row]
        assert len(items) in (whole, min(whole, round(64**0.65)))
        cut += len(items) < whole
        # actions number all events; each input's target is the next input, the last one's the last of the part
        last = int(DATA.offsets[row] + part_lengths(DATA.lengths, split)[row] - 1)
        following = [*actions[1:], last]
        assert all(a < b for a, b in pairwise([*actions, last])) and actions[0] >= last - whole
        assert items == DATA.item_ids[actions].tolist() and times == DATA.timestamps[actions].tolist()
        assert targets == DATA.item_ids[following].tolist()
        assert query_times == DATA.timestamps[following].tolist()
        if selection == "greedy":
            assert actions == list(range(last - len(items), last))
    assert cut >= 5


def test_subsequences_are_new_every_epoch() -> None:
    loader = loader_of(stochastic_length=SHORTER)
    first, second = by_row(loader.epoch(0)), by_row(loader.epoch(1))
    assert first == by_row(loader_of(stochastic_length=SHORTER).epoch(0))
    assert sum(first[row] != second[row] for row in first) >= 5
    assert first != by_row(loader_of(stochastic_length=SHORTER, seed=4).epoch(0))


def test_random_windows_reach_all_of_a_long_history_and_nothing_held_out() -> None:
    loader = loader_of(window="random", max_length=20)
    rows = split_rows(DATA.lengths, Split.TRAIN, 20)
    seen: dict[int, set[int]] = {row: set() for row in rows.sequences.tolist()}
    for epoch in range(40):
        for row, (items, _, actions, targets, _) in by_row(loader.epoch(epoch)).items():
            # actions number all events: the inputs follow each other, and so does the last target
            events = list(range(actions[0], actions[0] + len(actions) + 1))
            assert actions == events[:-1] and items == DATA.item_ids[events[:-1]].tolist()
            assert targets == DATA.item_ids[events[1:]].tolist()
            seen[row] |= set(events)
    for row, start, length in zip(rows.sequences, rows.starts, rows.lengths, strict=True):
        first = int(DATA.offsets[row])
        part = set(range(first, first + int(start + length) + 1))
        # the very first and last events of a long history are rarely in a window
        assert seen[int(row)] <= part and len(seen[int(row)]) > 0.85 * len(part)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_have_the_batches_of_one(kind: str, world_size: int) -> None:
    alone = loader_of(**KINDS[kind])
    ranks = [loader_of(Shard(rank=rank, world_size=world_size), **KINDS[kind]) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {len(alone)}
    for whole, *shares in zip(alone.epoch(1), *(rank.epoch(1) for rank in ranks), strict=True):
        together = by_row(iter(shares))
        assert together == by_row(iter([whole])) and together


@pytest.mark.parametrize("kind", KINDS)
def test_every_sequence_once_although_the_number_of_ranks_changes_in_mid_epoch(kind: str) -> None:
    epoch, stages = 1, [1, 2, 4, 3]
    batches = len(loader_of(**KINDS[kind]))
    stops = [batches * (i + 1) // len(stages) for i in range(len(stages))]
    assert len(set(stops)) == len(stages)
    stored = json.dumps(TrainState(epoch=epoch).state_dict())
    seen: list[JaggedBatch] = []
    for world_size, stop in zip(stages, stops, strict=True):
        state = TrainState()
        state.load_state_dict(json.loads(stored))
        shards = [Shard(rank=rank, world_size=world_size) for rank in range(world_size)]
        feeds = [loader_of(shard, **KINDS[kind]).epoch(state.epoch, state.batch) for shard in shards]
        while state.batch < stop:
            seen += [next(feed) for feed in feeds]
            state.batch += 1
        stored = json.dumps(state.state_dict())
    assert by_row(iter(seen)) == by_row(loader_of(**KINDS[kind]).epoch(epoch))


def costs_of(loader: BatchLoader, law: CostLaw, epoch: int) -> np.ndarray:
    return np.array([law.of(batch.lengths.numpy()).sum() for batch in loader.epoch(epoch)])


@pytest.mark.parametrize(("by", "law"), [("tokens", CostLaw()), ("flops", LAW)])
def test_batches_of_equal_work(by: Any, law: CostLaw) -> None:
    budget = 2.5 * float(law.of(np.array([64]))[0])
    loader = loader_of(batching=BatchingConfig(by=by, budget=budget))
    for epoch in range(3):
        costs = costs_of(loader, law, epoch)
        assert abs(costs - costs.mean()).max() <= law.of(np.array([64]))[0]
        assert 0.6 * budget < costs.mean() <= budget
    uneven = costs_of(loader_of(), law, 0)
    assert costs.std() / costs.mean() < 0.7 * uneven.std() / uneven.mean()


@pytest.mark.parametrize("by", ["tokens", "flops"])
def test_without_a_budget_there_are_as_many_batches_as_by_sequences(by: Any) -> None:
    assert len(loader_of(batching=BatchingConfig(by=by))) == len(loader_of())


def test_a_budget_counts_what_is_left_of_cut_sequences() -> None:
    batching = BatchingConfig(by="tokens", budget=100)
    loader = loader_of(batching=batching, stochastic_length=SHORTER)
    assert len(loader) < len(loader_of(batching=batching))
    means = [costs_of(loader, CostLaw(), epoch).mean() for epoch in range(20)]
    assert np.mean(means) == pytest.approx(100, rel=0.15)


@pytest.mark.parametrize("budget", [1, 1e9])
def test_a_budget_below_one_sequence_or_above_all_of_them(budget: float) -> None:
    sizes = [b.num_sequences for b in loader_of(batching=BatchingConfig(by="tokens", budget=budget)).epoch(0)]
    rows = len(split_rows(DATA.lengths, Split.TRAIN, 64).sequences)
    assert sizes == ([1] * rows if budget == 1 else [rows])


@settings(max_examples=100, deadline=None)
@given(costs=st.lists(st.floats(0.1, 100), min_size=1, max_size=30).map(np.array), data=st.data())
def test_bounds_leave_no_batch_empty(costs: np.ndarray, data: st.DataObject) -> None:
    batches = data.draw(st.integers(1, len(costs)))
    bounds = equal_cost_bounds(costs, batches)
    assert bounds[0] == 0 and bounds[-1] == len(costs) and len(bounds) == batches + 1 and (np.diff(bounds) > 0).all()
    mean = costs.sum() / batches
    if costs.max() <= mean:
        sums = np.add.reduceat(costs, bounds[:-1])
        assert abs(sums - mean).max() <= costs.max() + 1e-6


def test_no_rows_no_batches() -> None:
    config = LoaderConfig(split=Split.TRAIN, global_batch_size=2, batching=BatchingConfig(by="tokens", budget=9))
    loader = BatchLoader(dataset_of([1, 2, 3]), config)
    assert len(loader) == 0 and list(loader.epoch(0)) == []


@pytest.mark.parametrize("balance", ["none", "counts", "cost"])
def test_imbalance_is_that_of_the_shares(balance: Any) -> None:
    shards = [Shard(rank=rank, world_size=3) for rank in range(3)]
    batching = BatchingConfig(balance=balance)
    loaders = [loader_of(shard, global_batch_size=10, batching=batching) for shard in shards]
    for index, shares in enumerate(zip(*(loader.epoch(0) for loader in loaders), strict=True)):
        work = torch.tensor([float(LAW.of(share.lengths.numpy()).sum()) for share in shares])
        found = {loader.imbalance(0, index) for loader in loaders}
        assert len(found) == 1
        (figures,) = found
        assert figures.after == pytest.approx(float(work.max() / work.mean()) - 1, abs=1e-5)
        assert figures.bound - 1e-9 <= figures.after
        assert (figures.after == figures.before) if balance == "none" else (figures.after <= figures.before)
