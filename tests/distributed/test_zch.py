"""Eviction equals a plain program with a dictionary, and nothing that is met is lost between evictions."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hstu_dist.distributed.config import VocabularyConfig
from hstu_dist.distributed.zch import EMPTY, Buckets, Layout, Met, ids_of, keys_of

CPU = torch.device("cpu")
# rows that the buckets do not divide
LAYOUT = Layout(num_rows=45, buckets=4)


@dataclass
class Owner:
    """Of a row: an id's key, look-ups since it has the row, and the step of the last one."""

    key: int
    count: int
    last: int


@dataclass
class Plain:
    """One bucket, written out: every row has an owner or none; the last row of the bucket is nobody's."""

    rows: int
    eviction: str
    owners: dict[int, Owner] = field(default_factory=dict)
    waiting: dict[int, list[int]] = field(default_factory=dict)

    def score(self, owner: Owner | None, step: int) -> float:
        if self.eviction == "lfu":
            return owner.count if owner else 0
        age = step - (owner.last if owner else 0) + 1
        return -age if self.eviction == "lru" else (owner.count if owner else 0) / age

    def meet(self, keys: list[int], step: int, interval: int) -> None:
        for key, count in Counter(keys).items():
            earlier = self.waiting.get(key, [0, 0])[0]
            self.waiting[key] = [earlier + count, step]
        if step % interval:
            most = sorted(self.waiting.items(), key=lambda one: (-one[1][0], one[0]))
            self.waiting = dict(most[: self.rows])
            return
        by_key = {owner.key: owner for owner in self.owners.values()}
        new = []
        for key, (count, last) in sorted(self.waiting.items()):
            if key in by_key:
                by_key[key].count += count
                by_key[key].last = last
            else:
                new.append(Owner(key, count, last))
        self.waiting = {}
        new.sort(key=lambda owner: -owner.count)
        everyone: list[tuple[int | None, Owner | None]] = [(r, self.owners.get(r)) for r in range(self.rows - 1)]
        everyone += [(None, owner) for owner in new]
        # stable: who has a row keeps it among equals
        everyone.sort(key=lambda one: -self.score(one[1], step))
        stay, leave = everyone[: self.rows - 1], everyone[self.rows - 1 :]
        free = [row for row, _ in leave if row is not None]
        for row, (_, owner) in zip(free, [one for one in stay if one[0] is None], strict=True):
            assert owner is not None
            self.owners[row] = owner


def stream(seed: int, steps: int) -> list[list[int]]:
    """Ids of each step: popular ones, new ones that come with time, far beyond 32 bits and negative."""
    chosen = random.Random(seed)
    return [
        [chosen.choice((1, -1)) * ((1 << 40) + step + chosen.randrange(80)) for _ in range(chosen.randrange(40))]
        for step in range(steps)
    ]


def met(ids: list[int], step: int) -> Met:
    keys, counts = keys_of(torch.tensor(ids, dtype=torch.int64)).unique(return_counts=True)
    return Met(keys, counts, torch.full_like(keys, step))


@pytest.mark.parametrize(("eviction", "interval"), [*product(("lru", "lfu", "distance_lfu"), (1, 4))])
def test_equals_a_plain_dictionary(eviction: Any, interval: int) -> None:
    config = VocabularyConfig(kind="zch", eviction=eviction, eviction_interval=interval, buckets=LAYOUT.buckets)
    ours = Buckets(config, LAYOUT, range(LAYOUT.buckets), CPU)
    firsts = [LAYOUT.first_row(bucket) for bucket in range(LAYOUT.buckets + 1)]
    plain = [Plain(after - first, eviction) for first, after in pairwise(firsts)]
    given = evicted = 0
    for step, ids in enumerate(stream(3, 60), start=1):
        keys = keys_of(torch.tensor(ids, dtype=torch.int64))
        mine = LAYOUT.bucket_of(keys).tolist()
        change = ours.meet(met(ids, step), step)
        given += change.rows.numel() if change else 0
        evicted += change.evicted if change else 0
        for bucket, one in enumerate(plain):
            one.meet([key for key, b in zip(keys.tolist(), mine, strict=True) if b == bucket], step, interval)
        found, known = ours.rows_of(keys)
        expected = {o.key: firsts[b] + row for b, one in enumerate(plain) for row, o in one.owners.items()}
        assert known.tolist() == [key in expected for key in keys.tolist()]
        for key, row, bucket in zip(keys.tolist(), found.tolist(), mine, strict=True):
            assert row == expected.get(key, firsts[bucket + 1] - 1)
    occupied = sum(len(one.owners) for one in plain)
    assert given - evicted == occupied == int((ours.state["keys"] != EMPTY).sum())
    assert evicted > 20 or eviction == "lfu"


def test_buckets_apart_are_buckets_together() -> None:
    config = VocabularyConfig(kind="zch", eviction_interval=3, buckets=LAYOUT.buckets)
    whole = Buckets(config, LAYOUT, range(4), CPU)
    parts = [Buckets(config, LAYOUT, which, CPU) for which in (range(1), range(1, 4), range(4, 4))]
    for step, ids in enumerate(stream(4, 40), start=1):
        everything = met(ids, step)
        whole.meet(everything, step)
        bucket = LAYOUT.bucket_of(everything.keys)
        for part in parts:
            part.meet(everything.at((bucket >= part.which.start) & (bucket < part.which.stop)), step)
    for name, values in whole.state.items():
        joined = torch.cat([part.state[name] for part in parts])
        # where nobody waits, what was written there before is left
        used = torch.cat([part.state["waiting_keys"] for part in parts]) != EMPTY
        assert torch.equal(joined[used], values[used]) if name.startswith("waiting") else torch.equal(joined, values)


def test_more_new_ids_than_rows_wait_by_how_often_they_were_met() -> None:
    config = VocabularyConfig(kind="zch", eviction_interval=2, buckets=1)
    buckets = Buckets(config, Layout(num_rows=4, buckets=1), range(1), CPU)
    buckets.meet(met([7] * 3 + [8] * 2 + list(range(100, 140)), 1), 1)
    buckets.meet(met([7], 2), 2)
    rows, known = buckets.rows_of(keys_of(torch.tensor([7, 8])))
    assert known.all() and rows.unique().numel() == 2


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [part.numel() for part in tree_leaves(found) if isinstance(part, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return found


def test_between_two_evictions_nothing_of_the_size_of_the_table_is_touched() -> None:
    rows, config = 100_000, VocabularyConfig(kind="zch", eviction_interval=4, buckets=4)
    buckets = Buckets(config, Layout(num_rows=rows, buckets=4), range(4), CPU)
    steps = {}
    for step, ids in enumerate(stream(5, 8), start=1):
        with Largest() as largest:
            buckets.meet(met(ids, step), step)
            buckets.rows_of(keys_of(torch.tensor(ids)))
        steps[step] = largest.elements
    # the first step looks for what a checkpoint may have brought, the first after an eviction makes an index
    assert all(steps[step] < 1000 for step in (2, 3, 6, 7))
    assert steps[4] >= rows // 4 and steps[8] >= rows // 4


def test_keys_can_be_turned_back_into_ids() -> None:
    ids = torch.tensor([0, 1, -1, 2**31, -(2**40), 2**63 - 1, -(2**63)])
    assert torch.equal(ids_of(keys_of(ids)), ids)
    assert keys_of(ids).unique().numel() == ids.numel()
