"""BatchLoader: jagged batches whose order depends on seed and epoch only, whatever the number of ranks.

Global batch b of an epoch is the b-th run of that epoch's order (see `epoch`); every rank takes its share of it. So a
position in the data is (epoch, batch), valid for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hstu_dist.batch import JaggedBatch
from hstu_dist.data.balance import Imbalance
from hstu_dist.data.config import LoaderConfig
from hstu_dist.data.dataset import Ints, SequenceDataset
from hstu_dist.data.epoch import EpochLayout, EpochPlanner
from hstu_dist.data.record_split import RecordSplit
from hstu_dist.data.split import Moments, Rows, Split, part_lengths, recent_rows
from hstu_dist.data.stochastic_length import History, spans
from hstu_dist.data.time_split import first_events, own_action_rows

_SEQUENCES_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Which share of every global batch is this process's.

    Raises:
        ValueError: not 0 <= rank < world_size.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"Shard.rank: got {self.rank}, expected 0 <= rank < world_size = {self.world_size}")


class BatchLoader:
    """This rank's part of every global batch of a split.

    Only sequences with something to predict in the split take part (see `split`); each comes exactly once an
    epoch, on exactly one rank. The last global batch may be smaller, and a rank's share of any batch empty.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        config: LoaderConfig,
        shard: Shard | None = None,
        contextual: Ints | None = None,
    ) -> None:
        """Lays the split out; `contextual` [S, C] int64, if given, has the codes of every user's features."""
        self.dataset = dataset
        self.config = config
        self.shard = shard or Shard()
        self.contextual = contextual
        self._rows = _rows_of(dataset, config)
        self._planner = EpochPlanner(self._rows, config)
        self._latest: EpochLayout | None = None

    def __len__(self) -> int:
        """Global batches an epoch; the same on every rank and in every epoch."""
        return self._planner.num_batches

    @property
    def num_sequences(self) -> int:
        """Sequences that take part, over all ranks."""
        return len(self._rows.sequences)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[JaggedBatch]:
        """Batches `first_batch` to the last of an epoch; continuing there equals never having stopped.

        Args:
            epoch: >= 0; chooses the order and, with stochastic length, the subsequences.
            first_batch: 0 to len(self); at len(self) nothing is left.

        Raises:
            ValueError: one of them is out of range.
        """
        if epoch < 0:
            raise ValueError(f"epoch: got {epoch}, expected >= 0")
        if not 0 <= first_batch <= len(self):
            raise ValueError(f"first_batch: got {first_batch}, expected 0 to {len(self)}")
        return self._batches(self._layout(epoch), first_batch)

    def imbalance(self, epoch: int, batch: int) -> Imbalance:
        """How evenly the work of a global batch is shared out; the same on every rank."""
        return self._layout(epoch).imbalance(batch, self.shard.world_size)

    def _layout(self, epoch: int) -> EpochLayout:
        if self._latest is None or self._latest.epoch != epoch:
            self._latest = self._planner.layout(epoch)
        return self._latest

    def _batches(self, layout: EpochLayout, first_batch: int) -> Iterator[JaggedBatch]:
        for batch in range(first_batch, len(self)):
            yield self._gather(layout, layout.share(batch, self.shard.rank, self.shard.world_size))

    def _gather(self, layout: EpochLayout, rows: Ints) -> JaggedBatch:
        data = self.dataset
        sequences, kept = self._rows.sequences[rows], layout.lengths[rows]
        # every history with the last target, which follows it, unless the last input is its own
        ahead = 1 if self.config.targets == "next" else 0
        sizes = self._rows.lengths[rows] + ahead
        read = data.read(data.offsets[sequences] + layout.starts[rows], sizes)
        ends = np.cumsum(sizes)
        history = History(sequences=sequences, firsts=ends - sizes, lengths=sizes - ahead, kept=kept)
        law = self._planner.stochastic_length
        inputs = spans(history.firsts, kept) if law is None else law.events(history, read.timestamps, layout.epoch)
        offsets = np.concatenate(([0], np.cumsum(kept)))
        lasts = offsets[1:] - 1, ends - 1
        items, times = read.item_ids[inputs], read.timestamps[inputs]
        return JaggedBatch(
            offsets=torch.from_numpy(offsets),
            item_ids=torch.from_numpy(items),
            timestamps=torch.from_numpy(times),
            actions=torch.from_numpy(read.actions[inputs]),
            target_ids=torch.from_numpy(_following(items, lasts, read.item_ids)),
            query_times=torch.from_numpy(_following(times, lasts, read.timestamps)),
            row_ids=torch.from_numpy(sequences),
            contextual=None if self.contextual is None else torch.from_numpy(self.contextual[sequences]),
        )


def _following(values: Ints, lasts: tuple[Ints, Ints], column: Ints) -> Ints:
    """[T] the value of the event after each input: the next input's, or after the last one that of the last target.

    Args:
        values: [T] of the inputs.
        lasts: [B] places of the last inputs, and [B] events that follow them.
        column: [E] of the events that were read.
    """
    following = np.empty_like(values)
    following[:-1] = values[1:]
    places, events = lasts
    following[places] = column[events]
    return following


def popularity(
    dataset: SequenceDataset, split: Split = Split.TRAIN, cut: Moments | RecordSplit | None = None
) -> torch.Tensor:
    """How often each item occurs among the events that a retrieval model may train on; [num_items] int64.

    Args:
        dataset: all of its sequences count, also those too short to train on.
        split: TRAIN, or TRAIN_VALIDATION after a refit.
        cut: where a split by time or of whole sequences cuts; None: leave-one-out.

    Raises:
        ValueError: a split that holds evaluation targets.
    """
    if split not in (Split.TRAIN, Split.TRAIN_VALIDATION):
        raise ValueError(f"split: got {split}, expected train or train_validation")
    counts = np.zeros(dataset.num_items, dtype=np.int64)
    ends = _parts(dataset, split, cut)
    for first in range(0, dataset.num_sequences, _SEQUENCES_AT_ONCE):
        here = slice(first, first + _SEQUENCES_AT_ONCE)
        events = spans(dataset.offsets[:-1][here], ends[here])
        counts += np.bincount(dataset.item_ids[events], minlength=dataset.num_items)
        dataset.forget_pages()
    return torch.from_numpy(counts)


def _rows_of(dataset: SequenceDataset, config: LoaderConfig) -> Rows:
    if config.targets == "own":
        assert isinstance(config.cut, Moments)
        return own_action_rows(dataset, config.cut, config.split, config.max_length)
    return recent_rows(_parts(dataset, config.split, config.cut), config.max_length)


def _parts(dataset: SequenceDataset, split: Split, cut: Moments | RecordSplit | None) -> Ints:
    """[S] int64, how many of each sequence's first events belong to a split whose targets are next events."""
    match cut:
        case None:
            return part_lengths(dataset.lengths, split)
        case RecordSplit():
            return cut.parts(dataset.lengths, split)
        case Moments():
            return first_events(dataset, cut, split)
