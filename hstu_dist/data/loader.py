"""BatchLoader: jagged batches whose order depends on seed and epoch only, whatever the number of ranks.

Global batch b of an epoch is the b-th run of `global_batch_size` sequences of that epoch's order; every rank takes
each world_size-th sequence of it. So a position in the data is (epoch, batch), valid for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hstu_dist.batch import JaggedBatch
from hstu_dist.data.config import LoaderConfig
from hstu_dist.data.dataset import Ints, SequenceDataset
from hstu_dist.data.split import Split, part_lengths, split_rows


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
    epoch, on exactly one rank. The last global batch may be smaller, and a rank's share of it empty.
    """

    def __init__(self, dataset: SequenceDataset, config: LoaderConfig, shard: Shard | None = None) -> None:
        self.dataset = dataset
        self.config = config
        self.shard = shard or Shard()
        self._rows = split_rows(dataset.lengths, config.split, config.max_length)

    def __len__(self) -> int:
        """Global batches an epoch; the same on every rank."""
        return -(-self.num_sequences // self.config.global_batch_size)

    @property
    def num_sequences(self) -> int:
        """Sequences that take part, over all ranks."""
        return len(self._rows.sequences)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[JaggedBatch]:
        """Batches `first_batch` to the last of an epoch; continuing there equals never having stopped.

        Args:
            epoch: >= 0; chooses the order.
            first_batch: 0 to len(self); at len(self) nothing is left.

        Raises:
            ValueError: one of them is out of range.
        """
        if epoch < 0:
            raise ValueError(f"epoch: got {epoch}, expected >= 0")
        if not 0 <= first_batch <= len(self):
            raise ValueError(f"first_batch: got {first_batch}, expected 0 to {len(self)}")
        return self._batches(epoch, first_batch)

    def _batches(self, epoch: int, first_batch: int) -> Iterator[JaggedBatch]:
        order = self._order(epoch)
        size = self.config.global_batch_size
        for batch in range(first_batch, len(self)):
            mine = order[batch * size : (batch + 1) * size][self.shard.rank :: self.shard.world_size]
            yield self._gather(mine)

    def _order(self, epoch: int) -> Ints:
        if not self.config.shuffle:
            return np.arange(self.num_sequences)
        bits = np.random.Philox(np.random.SeedSequence([self.config.seed, epoch]))
        # sorted raw bits, not Generator.permutation, whose result may change between NumPy versions
        return np.argsort(bits.random_raw(self.num_sequences), kind="stable")

    def _gather(self, rows: Ints) -> JaggedBatch:
        data = self.dataset
        sequences, lengths = self._rows.sequences[rows], self._rows.lengths[rows]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        first_events = data.offsets[sequences] + self._rows.starts[rows]
        events = np.arange(offsets[-1]) + np.repeat(first_events - offsets[:-1], lengths)
        return JaggedBatch(
            offsets=torch.from_numpy(offsets),
            item_ids=torch.from_numpy(data.item_ids[events]),
            timestamps=torch.from_numpy(data.timestamps[events]),
            actions=torch.from_numpy(data.actions[events]),
            target_ids=torch.from_numpy(data.item_ids[events + 1]),
            query_times=torch.from_numpy(data.timestamps[events + 1]),
            row_ids=torch.from_numpy(sequences),
        )


def popularity(dataset: SequenceDataset, split: Split = Split.TRAIN) -> torch.Tensor:
    """How often each item occurs among the events that a model may train on; [num_items] int64.

    Args:
        dataset: all of its sequences count, also those too short to train on.
        split: TRAIN, or TRAIN_VALIDATION after a refit.

    Raises:
        ValueError: a split that holds evaluation targets.
    """
    if split not in (Split.TRAIN, Split.TRAIN_VALIDATION):
        raise ValueError(f"split: got {split}, expected train or train_validation")
    ends = part_lengths(dataset.lengths, split)
    position = np.arange(len(dataset.item_ids)) - np.repeat(dataset.offsets[:-1], dataset.lengths)
    seen = dataset.item_ids[position < np.repeat(ends, dataset.lengths)]
    return torch.from_numpy(np.bincount(seen, minlength=dataset.num_items))
