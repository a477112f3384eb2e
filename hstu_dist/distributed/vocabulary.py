"""From any ids to rows of a table, the same on all ranks: a hash, or a vocabulary that grows and forgets.

A vocabulary knows nothing of how its table is sharded. Ids travel to the rank that has their bucket and come back as
row numbers; rows then travel as those of any table do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata

from hstu_dist.distributed.config import TableSpec
from hstu_dist.distributed.torchrec_tables import place_of
from hstu_dist.distributed.zch import EMPTY, Buckets, Layout, Met, keys_of
from hstu_dist.ops.random import mix64


@dataclass(frozen=True)
class FoundRows:
    """Rows of some ids.

    Attributes:
        rows: [N] int64.
        known: [N] bool, whether the id has a row that it need not share because it is new.
    """

    rows: Tensor
    known: Tensor


@dataclass
class Usage:
    """What happened since it was last read; of this rank's look-ups, or of its buckets.

    Attributes:
        lookups: ids of training steps.
        shared: of these, those whose row another id uses: with hash, another id of the same step of this rank; with
            zch, all ids that have no row of their own.
        admitted: ids that got a row.
        evicted: ids that lost theirs.
    """

    lookups: int = 0
    shared: int = 0
    admitted: int = 0
    evicted: int = 0

    def take(self) -> list[int]:
        """The counts in order, which begin anew."""
        counts = [getattr(self, field.name) for field in fields(self)]
        self.lookups = self.shared = self.admitted = self.evicted = 0
        return counts


class RowVocabulary(Protocol):
    """Turns ids into rows of one table. All ranks call every method together."""

    usage: Usage

    def find(self, ids: Tensor, admit: bool) -> FoundRows:
        """Rows of ids [N] int64, any values.

        Args:
            ids: of this rank; any number.
            admit: whether these look-ups train: they count, and new ids may get rows.
        """

    def occupied(self) -> Tensor | None:
        """[num_rows] bool, rows that stand for an id; None: all may."""

    def occupied_rows(self) -> Tensor | None:
        """Numbers of the rows that stand for an id, ascending, [O] int32; None: all may."""

    def state_tensors(self) -> dict[str, Any]:
        """What a checkpoint needs, by name, plain or sharded; whoever has them may fill them."""


class HashedVocabulary:
    """Every id shares a row with all ids of the same hash."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.usage = Usage()

    def find(self, ids: Tensor, admit: bool) -> FoundRows:
        """As of `RowVocabulary`."""
        rows = self._hash(ids)
        if admit:
            distinct, counts = ids.unique(return_counts=True)
            _, places, ids_of_row = self._hash(distinct).unique(return_inverse=True, return_counts=True)
            self.usage.lookups += ids.numel()
            self.usage.shared += int(counts[ids_of_row[places] > 1].sum())
        return FoundRows(rows, torch.ones_like(ids, dtype=torch.bool))

    def _hash(self, ids: Tensor) -> Tensor:
        # without the sign: a remainder of negative numbers would be negative
        return (mix64(ids) & torch.iinfo(torch.int64).max) % self.num_rows

    def occupied(self) -> None:
        """Every row may stand for an id."""

    def occupied_rows(self) -> None:
        """As `occupied`."""

    def state_tensors(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class GrowingVocabulary:
    """Zero-collision hashing over all ranks: an id has a row of its own until a newer one gets it."""

    def __init__(self, spec: TableSpec, device: torch.device, reset: Callable[[Tensor], None]) -> None:
        """`reset` makes rows that change hands as new; it gets their numbers, all of them on every rank."""
        config = spec.config.vocabulary
        assert config.buckets is not None
        self.usage = Usage()
        self._layout = Layout(spec.shape.num_rows, config.buckets)
        self._ranks = dist.get_world_size()
        firsts = [self._layout.first_bucket(rank, self._ranks) for rank in range(self._ranks + 1)]
        self._first_buckets = torch.tensor(firsts, device=device)
        rank = dist.get_rank()
        self._buckets = Buckets(config, self._layout, range(firsts[rank], firsts[rank + 1]), device)
        self._reset = reset
        self._step = torch.zeros((), dtype=torch.int64)
        self._interval = config.eviction_interval or 1
        self._occupied: Tensor | None = None
        self._occupied_rows: Tensor | None = None

    def find(self, ids: Tensor, admit: bool) -> FoundRows:
        """As of `RowVocabulary`."""
        keys, places, counts = keys_of(ids).unique(return_inverse=True, return_counts=True)
        sent = torch.searchsorted(self._layout.bucket_of(keys), self._first_buckets).diff().tolist()
        asked, received = self._exchange(torch.stack([keys, counts], dim=1), sent)
        asked_keys, asked_counts = (column.contiguous() for column in asked.unbind(1))
        if admit:
            self._admit(asked_keys, asked_counts)
        rows, known = self._buckets.rows_of(asked_keys)
        # one number carries both: ~row where the row is shared
        (answers, _) = self._exchange(torch.where(known, rows, ~rows), received)
        found = answers[places]
        known = found >= 0
        if admit:
            self.usage.lookups += ids.numel()
            self.usage.shared += int((~known).sum())
        return FoundRows(torch.where(known, found, ~found), known)

    def occupied(self) -> Tensor:
        """As of `RowVocabulary`; made once, then kept up to date."""
        if self._occupied is None:
            held, keys = self._buckets, self._buckets.state["keys"]
            mask = torch.zeros(self._layout.num_rows, dtype=torch.uint8, device=keys.device)
            mask[held.first_row : held.first_row + keys.numel()] = keys != EMPTY
            dist.all_reduce(mask, dist.ReduceOp.MAX)
            self._occupied = mask.bool()
        return self._occupied

    def occupied_rows(self) -> Tensor:
        """As of `RowVocabulary`; made anew only when a row was given away that nobody had."""
        if self._occupied_rows is None:
            rows = self.occupied().nonzero().squeeze(1)
            # each rank holds them all: half of the memory of int64, where they fit
            self._occupied_rows = rows.int() if self._layout.num_rows < 1 << 31 else rows
        return self._occupied_rows

    def state_tensors(self) -> dict[str, Any]:
        """As of `RowVocabulary`."""
        # they may be filled: what is derived from them is derived anew
        self._buckets.loaded()
        self._occupied = self._occupied_rows = None
        sharded = {name: self._sharded(value) for name, value in self._buckets.state.items()}
        return {"step": self._step, **sharded}

    def _admit(self, keys: Tensor, counts: Tensor) -> None:
        self._step += 1
        step = int(self._step)
        met = Met(keys, counts, torch.full_like(keys, step))
        change = self._buckets.meet(Met.joined([met]), step)
        if step % self._interval:
            return
        assert change is not None
        self.usage.admitted += change.rows.numel()
        self.usage.evicted += change.evicted
        rows = self._all(change.rows)
        if rows.numel():
            self._reset(rows)
            if self._occupied is not None:
                if not bool(self._occupied[rows].all()):
                    self._occupied_rows = None
                self._occupied[rows] = True

    def _exchange(self, values: Tensor, sent: list[int]) -> tuple[Tensor, list[int]]:
        """Runs of rows to each rank; what came from each, and how many."""
        if self._ranks == 1:
            return values, sent
        sizes = torch.tensor(sent, device=values.device)
        theirs = torch.empty_like(sizes)
        dist.all_to_all_single(theirs, sizes)
        received = theirs.tolist()
        got = values.new_empty(sum(received), *values.shape[1:])
        dist.all_to_all_single(got, values.contiguous(), received, sent)
        return got, received

    def _all(self, rows: Tensor) -> Tensor:
        """Those of all ranks, in order of the ranks."""
        if self._ranks == 1:
            return rows
        parts, _ = self._exchange(rows.repeat(self._ranks), [rows.numel()] * self._ranks)
        return parts

    def _sharded(self, local: Tensor) -> ShardedTensor:
        """A tensor by row, of which this rank has its buckets' part."""
        starts = [self._layout.first_row(bucket) for bucket in self._first_buckets.tolist()]
        # a part without rows would pass for a copy of the one that begins where it does
        shards = {
            rank: ShardMetadata([start], [end - start], place_of(rank, local.device.type))
            for rank, (start, end) in enumerate(pairwise(starts))
            if start < end
        }
        metadata = ShardedTensorMetadata(
            shards_metadata=list(shards.values()),
            size=torch.Size([self._layout.num_rows]),
            tensor_properties=TensorProperties(dtype=local.dtype),
        )
        rank = dist.get_rank()
        mine = [Shard(local, shards[rank])] if rank in shards else []
        return ShardedTensor._init_from_local_shards_and_global_metadata(mine, metadata, dist.group.WORLD)


def vocabulary_of(spec: TableSpec, device: torch.device, reset: Callable[[Tensor], None]) -> RowVocabulary | None:
    """What a table's settings ask for; None: ids are row numbers. Arguments as of `GrowingVocabulary`."""
    match spec.config.vocabulary.kind:
        case "hash":
            return HashedVocabulary(spec.shape.num_rows)
        case "zch":
            return GrowingVocabulary(spec, device, reset)
    return None
