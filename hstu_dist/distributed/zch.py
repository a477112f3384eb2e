"""One rank's share of a vocabulary that grows: which id has which row, and whose rows new ids get.

Ids and rows are split into buckets: an id belongs to the bucket that its key falls into, a row to that of its block of
neighbouring rows, whichever rank holds them. So what happens depends on the look-ups alone, and any number of ranks can
share the buckets. Who stays is decided by TorchRec's eviction policies. Its module around them is not used: it ties
ids to ranks, so that it cannot scale up, leaves out look-ups beyond 1.25 times those of its first step, and loses
those that wait for the next eviction when a run is resumed.

Shapes: R rows of this rank, U distinct keys, ascending.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    MCHEvictionPolicy,
)

from hstu_dist.distributed.config import VocabularyConfig
from hstu_dist.ops.random import mix64, unmix64

EMPTY = torch.iinfo(torch.int64).max
"""Key of a row that no id has."""

_LAST = "last_access_iter"
"""TorchRec's name of the step in which an id was met last."""


def keys_of(ids: Tensor) -> Tensor:
    """Int64 keys of int64 ids: spread evenly, and different for different ids but for one pair of all 2^64."""
    return mix64(ids).clamp_(max=EMPTY - 1)


def ids_of(keys: Tensor) -> Tensor:
    """Ids that `keys_of` made keys of; the keys must not be EMPTY."""
    return unmix64(keys)


@dataclass(frozen=True)
class Layout:
    """How the rows of a table are cut into buckets.

    Attributes:
        num_rows: of the table.
        buckets: how many.
    """

    num_rows: int
    buckets: int

    def first_row(self, bucket: int) -> int:
        """Where a bucket's rows begin; its last row belongs to all of its ids that have none."""
        return bucket * self.num_rows // self.buckets

    def first_bucket(self, rank: int, ranks: int) -> int:
        """Where a rank's buckets begin."""
        return rank * self.buckets // ranks

    def bucket_of(self, keys: Tensor) -> Tensor:
        """Int64, of the same shape; ascending where the keys are."""
        return ((keys >> 32) + (1 << 31)) * self.buckets >> 32


@dataclass(frozen=True)
class Change:
    """What an eviction did.

    Attributes:
        rows: int64 row numbers that were given to new ids.
        evicted: how many of them others had before.
    """

    rows: Tensor
    evicted: int


@dataclass(frozen=True)
class Met:
    """Look-ups by distinct key.

    Attributes:
        keys: [U] int64, ascending.
        counts: [U] int64, look-ups of each.
        last: [U] int64, step of the last one.
    """

    keys: Tensor
    counts: Tensor
    last: Tensor

    @classmethod
    def joined(cls, parts: list[Met]) -> Met:
        """Of all parts together."""
        keys, places = torch.cat([part.keys for part in parts]).unique(return_inverse=True)
        counts = torch.zeros_like(keys).index_add_(0, places, torch.cat([part.counts for part in parts]))
        last = torch.zeros_like(keys).scatter_reduce_(0, places, torch.cat([part.last for part in parts]), "amax")
        return cls(keys, counts, last)

    def at(self, which: Tensor | slice) -> Met:
        """Some of them."""
        return Met(self.keys[which], self.counts[which], self.last[which])


class Buckets:
    """Rows of some neighbouring buckets.

    Attributes:
        state: what a checkpoint needs, [R] int64 each, by row: the key that has it, what eviction goes by and, where
            new ids wait for an eviction, the look-ups since the last one.
        first_row: number of the first row.
    """

    def __init__(self, config: VocabularyConfig, layout: Layout, which: range, device: torch.device) -> None:
        """No id has a row yet; `which`: the buckets."""
        self.layout = layout
        self.which = which
        self.first_row = layout.first_row(which.start)
        self._policy = _policy(config)
        self._interval = config.eviction_interval or 1
        rows = layout.first_row(which.stop) - self.first_row
        self._remembered = [info.metadata_name for info in self._policy.metadata_info if info.is_mch_metadata]
        waiting = [] if self._interval == 1 else ["waiting_counts", f"waiting_{_LAST}"]
        zeros = [*self._remembered, *waiting]
        self.state = {name: torch.zeros(rows, dtype=torch.int64, device=device) for name in zeros}
        for name in ("keys", *(["waiting_keys"] if waiting else [])):
            self.state[name] = torch.full((rows,), EMPTY, device=device)
        self._index: tuple[Tensor, Tensor] | None = None
        # keys that wait, by bucket: finding them among all rows in every step would cost more than all else
        self._waits: list[int] | None = None

    def loaded(self) -> None:
        """To be called when `state` was filled from outside."""
        self._index = self._waits = None

    def rows_of(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Row numbers of keys of these buckets, int64, and whether each has a row of its own, bool."""
        places, known = self._find(keys)
        last = torch.tensor([self.layout.first_row(b + 1) - 1 for b in self.which], device=keys.device)
        shared = last[self.layout.bucket_of(keys) - self.which.start] if len(self.which) else keys
        return torch.where(known, places + self.first_row, shared), known

    def meet(self, met: Met, step: int) -> Change | None:
        """Counts the look-ups of a training step, from 1; every few steps new ids get rows."""
        if self._interval > 1:
            met = Met.joined([self._waiting(), met])
        if step % self._interval:
            self._wait(met)
            return None
        self._wait(met.at(slice(0)))
        changes = [self._evict(bucket, mine, step) for bucket, mine in self._by_bucket(met) if mine.keys.numel()]
        self._index = None
        rows = torch.cat([self.state["keys"][:0], *(change.rows for change in changes)])
        return Change(rows, sum(change.evicted for change in changes))

    def _by_bucket(self, met: Met) -> list[tuple[int, Met]]:
        buckets = torch.tensor([*self.which, self.which.stop], device=met.keys.device)
        ends = torch.searchsorted(self.layout.bucket_of(met.keys), buckets).tolist()
        return [(b, met.at(slice(ends[i], ends[i + 1]))) for i, b in enumerate(self.which)]

    def _block(self, bucket: int) -> slice:
        return slice(*(self.layout.first_row(b) - self.first_row for b in (bucket, bucket + 1)))

    def _find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Place of each key among these rows, and whether it has one."""
        if self._index is None:
            self._index = torch.sort(self.state["keys"])
        ordered, rows = self._index
        if not ordered.numel():
            return torch.zeros_like(keys), torch.zeros_like(keys, dtype=torch.bool)
        places = torch.searchsorted(ordered, keys).clamp_(max=ordered.numel() - 1)
        return rows[places], ordered[places] == keys

    def _evict(self, bucket: int, met: Met, step: int) -> Change:
        block = self._block(bucket)
        places, known = self._find(met.keys)
        # TorchRec wants them by falling count
        order = met.counts.argsort(descending=True, stable=True)
        known = known[order]
        evicted, chosen = self._policy.update_metadata_and_generate_eviction_scores(
            step,
            block.stop - block.start,
            order,
            met.counts[order],
            known,
            places[order][known] - block.start,
            {name: self.state[name][block] for name in self._remembered},
            # which it puts into that order itself
            {_LAST: met.last.clone()},
        )
        keys = self.state["keys"][block]
        replaced = int((keys[evicted] != EMPTY).sum())
        keys[evicted] = met.keys[order][~known][chosen]
        return Change(evicted + block.start + self.first_row, replaced)

    def _waiting(self) -> Met:
        names = ("waiting_keys", "waiting_counts", f"waiting_{_LAST}")
        parts = self._waiting_parts()
        return Met(*(torch.cat([self.state[name][:0], *(self.state[name][part] for part in parts)]) for name in names))

    def _waiting_parts(self) -> list[slice]:
        """Where keys wait: from the first row of each bucket on."""
        keys = self.state["waiting_keys"]
        if self._waits is None:
            self._waits = [int((keys[self._block(bucket)] != EMPTY).sum()) for bucket in self.which]
        starts = [self._block(bucket).start for bucket in self.which]
        return [slice(start, start + size) for start, size in zip(starts, self._waits, strict=True)]

    def _wait(self, met: Met) -> None:
        """Keeps look-ups for the next eviction: of each bucket as many keys as it has rows, those met most."""
        if self._interval == 1:
            return
        for part in self._waiting_parts():
            self.state["waiting_keys"][part] = EMPTY
        self._waits = []
        for bucket, mine in self._by_bucket(met):
            block = self._block(bucket)
            room = block.stop - block.start
            if mine.keys.numel() > room:
                mine = mine.at(mine.counts.argsort(descending=True, stable=True)[:room])
            filled = slice(block.start, block.start + mine.keys.numel())
            self.state["waiting_keys"][filled] = mine.keys
            self.state["waiting_counts"][filled] = mine.counts
            self.state[f"waiting_{_LAST}"][filled] = mine.last
            self._waits.append(mine.keys.numel())


def _policy(config: VocabularyConfig) -> MCHEvictionPolicy:
    if config.eviction == "distance_lfu":
        return DistanceLFU_EvictionPolicy(config.decay_exponent)
    return LFU_EvictionPolicy() if config.eviction == "lfu" else LRU_EvictionPolicy()
