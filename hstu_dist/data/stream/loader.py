"""Batches of a stream: window k is epoch k, so that a position (window, batch) is valid for any number of ranks.

A training example is a user's new events, as targets, with the most recent history before them as context. A user
with more new events than fit gets several examples: each new event is a target of exactly one of them, except the
first event of a user, which nothing comes before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from hstu_dist.batch import JaggedBatch
from hstu_dist.data.balance import Imbalance
from hstu_dist.data.config import BatchingConfig, LoaderConfig
from hstu_dist.data.draws import GOLDEN, Ints, mix
from hstu_dist.data.epoch import EpochLayout, EpochPlanner
from hstu_dist.data.loader import Shard
from hstu_dist.data.split import Rows
from hstu_dist.data.stochastic_length import spans
from hstu_dist.data.stream.archive import Archive, Window


@dataclass(frozen=True)
class Examples:
    """R runs of a window's events.

    Attributes:
        identities: [R] int64, of user and run.
        firsts: [R] int64, index of the first input among the events of the window.
        lengths: [R] int64 >= 1, inputs; the target of each is the event after it.
        contexts: [R] int64, inputs at the beginning whose target is history.
    """

    identities: Ints
    firsts: Ints
    lengths: Ints
    contexts: Ints

    @classmethod
    def of(cls, window: Window, max_length: int) -> Examples:
        """Cuts the events of each user into as few runs as leave half of `max_length` for history."""
        events = window.events
        first_target, end = np.maximum(window.history, 1), events.lengths
        targets = end - first_target
        # everything in one run where it fits; otherwise every target sees at least half of what the model could
        stride = np.where(end - 1 <= max_length, np.maximum(targets, 1), -(-max_length // 2))
        runs = -(-targets // stride)
        owner = np.repeat(np.arange(len(end)), runs)
        run = spans(np.zeros_like(runs), runs)
        begin = first_target[owner] + run * stride[owner]
        last = np.minimum(begin + stride[owner], end[owner])
        start = np.maximum(last - 1 - max_length, 0)
        identity = mix(events.users[owner].view(np.uint64) + run.astype(np.uint64) * GOLDEN)
        return cls(identity.view(np.int64), events.offsets[owner] + start, last - 1 - start, begin - 1 - start)


class WindowLoader:
    """This rank's share of every global batch of a window."""

    def __init__(self, archive: Archive, config: LoaderConfig, shard: Shard | None = None) -> None:
        self.archive = archive
        self.config = config
        self.shard = shard or Shard()
        self._current: _Opened | None = None

    def __len__(self) -> int:
        """Global batches of the window that was opened last; 0 before the first."""
        return 0 if self._current is None else len(self._current.layout.bounds) - 1

    def open(self, window: int) -> Window:
        """Makes a window, which must have been committed, the current one.

        Raises:
            UserError: it is missing or damaged.
        """
        return self._opened(window).window

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[JaggedBatch]:
        """Batches `first_batch` to the last of a window; continuing there equals never having stopped."""
        opened = self._opened(epoch)
        return self._batches(opened, opened.layout, first_batch)

    def evaluation(self, epoch: int, batch_size: int) -> Iterator[JaggedBatch]:
        """All examples of a window in batches of `batch_size` over all ranks, whatever is emitted for training."""
        opened = self._opened(epoch)
        config = replace(
            self.config, global_batch_size=batch_size, batching=BatchingConfig(), emission=None, shuffle=False
        )
        return self._batches(opened, EpochPlanner(opened.rows, config).layout(epoch), 0)

    def imbalance(self, epoch: int, batch: int) -> Imbalance:
        """How evenly the work of a global batch is shared out; the same on every rank."""
        return self._opened(epoch).layout.imbalance(batch, self.shard.world_size)

    def _opened(self, number: int) -> _Opened:
        if self._current is None or self._current.window.number != number:
            self._current = _Opened(self.archive.open(number), self.config)
        return self._current

    def _batches(self, opened: _Opened, layout: EpochLayout, first_batch: int) -> Iterator[JaggedBatch]:
        for batch in range(first_batch, len(layout.bounds) - 1):
            yield gather(opened, layout.share(batch, self.shard.rank, self.shard.world_size))


class _Opened:
    """A window and its examples."""

    def __init__(self, window: Window, config: LoaderConfig) -> None:
        self.window = window
        self.config = config
        self.examples = Examples.of(window, config.max_length)
        nothing = np.zeros(len(self.examples.lengths), dtype=np.int64)
        self.rows = Rows(sequences=self.examples.identities, starts=nothing, lengths=self.examples.lengths)

    @cached_property
    def layout(self) -> EpochLayout:
        """Of training."""
        return EpochPlanner(self.rows, self.config).layout(self.window.number)


def gather(opened: _Opened, rows: Ints) -> JaggedBatch:
    """The examples `rows` of a window as a batch."""
    events, examples = opened.window.events, opened.examples
    lengths = examples.lengths[rows]
    inputs = spans(examples.firsts[rows], lengths)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    place = np.arange(len(inputs)) - np.repeat(offsets[:-1], lengths)
    return JaggedBatch(
        offsets=torch.from_numpy(offsets),
        item_ids=torch.from_numpy(events.items[inputs]),
        timestamps=torch.from_numpy(events.seconds[inputs]),
        actions=torch.from_numpy(events.actions[inputs]),
        target_ids=torch.from_numpy(events.items[inputs + 1]),
        query_times=torch.from_numpy(events.seconds[inputs + 1]),
        row_ids=torch.from_numpy(rows),
        trained=torch.from_numpy(place >= np.repeat(examples.contexts[rows], lengths)),
    )
