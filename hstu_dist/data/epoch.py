"""An epoch laid out before its first batch: the order of its sequences, their lengths, and where batches end.

All of it depends on settings, seed and epoch only, so that every rank of any number of ranks knows all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hstu_dist.data.balance import (
    CostLaw,
    Imbalance,
    by_cost,
    by_cost_and_count,
    imbalance,
    in_turns,
    largest_item_bound,
)
from hstu_dist.data.config import BatchingConfig, LoaderConfig
from hstu_dist.data.draws import uniform, words
from hstu_dist.data.emission import Emission
from hstu_dist.data.split import Rows
from hstu_dist.data.stochastic_length import StochasticLength

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_WINDOWS = 1
"""Use of a sequence's random numbers; Stochastic Length has the ones without a number of their use, `emission` 2."""


class EpochPlanner:
    """Lays out the epochs of a run.

    The number of batches is the same in every epoch, although lengths and sequences may be drawn anew: learning-rate
    schedules and positions (epoch, batch) rely on it.
    """

    def __init__(self, rows: Rows, config: LoaderConfig) -> None:
        self.rows = rows
        self.config = config
        law = config.stochastic_length
        self.stochastic_length = None if law is None else StochasticLength(law, config.max_length, config.seed)
        self.emission = None if config.emission is None else Emission(config.emission, rows.lengths, config.seed)
        self.num_batches = self._num_batches()

    def layout(self, epoch: int) -> EpochLayout:
        """The epoch, >= 0."""
        rows = self.rows
        order = self._order(epoch)
        starts = rows.starts if self.config.window == "recent" else random_starts(rows, self.config.seed, epoch)
        lengths = rows.lengths
        if self.stochastic_length is not None:
            lengths = self.stochastic_length.kept_lengths(rows.sequences, lengths, epoch)
        if self.emission is not None:
            # by whole lengths: what is emitted must not depend on how it is cut
            order = order[self.emission.emitted(rows.sequences, rows.lengths, epoch)[order]]
        bounds = self._bounds(lengths[order])
        return EpochLayout(epoch=epoch, order=order, starts=starts, lengths=lengths, bounds=bounds, config=self.config)

    def _bounds(self, lengths: Ints) -> Ints:
        """Where the batches of an epoch end, for the lengths of its sequences in order."""
        if self.emission is not None and (self.config.batching.by == "sequences" or len(lengths) < self.num_batches):
            # as many batches as sequences are expected for: sizes follow how many were drawn
            return np.round(np.linspace(0, len(lengths), self.num_batches + 1)).astype(np.int64)
        if self.config.batching.by == "sequences":
            return np.minimum(np.arange(self.num_batches + 1) * self.config.global_batch_size, len(lengths))
        return equal_cost_bounds(self._budgeted.of(lengths), self.num_batches)

    @property
    def _budgeted(self) -> CostLaw:
        """What batches have the same amount of."""
        return self.config.cost if self.config.batching.by == "flops" else CostLaw()

    def _num_batches(self) -> int:
        batching, chances = self.config.batching, self._chances()
        count = math.ceil(float(chances.sum()))
        if batching.budget is None or not count:
            return -(-count // self.config.global_batch_size)
        return min(count, max(1, math.ceil(float((chances * self._expected_costs()).sum()) / batching.budget)))

    def _chances(self) -> Floats:
        """[R], how likely each row is part of an epoch."""
        lengths = self.rows.lengths
        return np.ones(len(lengths)) if self.emission is None else self.emission.probability(lengths)

    def _expected_costs(self) -> Floats:
        """[R], over the draws of lengths."""
        lengths = self.rows.lengths
        whole = self._budgeted.of(lengths)
        if self.stochastic_length is None:
            return whole
        cut = self._budgeted.of(np.minimum(lengths, self.stochastic_length.cut_length))
        expected: Floats = cut + self.stochastic_length.keep_probability(lengths) * (whole - cut)
        return expected

    def _order(self, epoch: int) -> Ints:
        count = len(self.rows.sequences)
        if not self.config.shuffle:
            return np.arange(count)
        bits = np.random.Philox(np.random.SeedSequence([self.config.seed, epoch]))
        # sorted raw bits, not Generator.permutation, whose result may change between NumPy versions
        return np.argsort(bits.random_raw(count), kind="stable")


@dataclass(frozen=True, kw_only=True)
class EpochLayout:
    """Every global batch of one epoch.

    Attributes:
        epoch: which one.
        order: [R] int64, indices into the rows of the split, batch after batch; with emission, some are left out.
        starts: [R] int64, first input that each row of the split has in this epoch, counted within its sequence.
        lengths: [R] int64, inputs that each row of the split has in this epoch.
        bounds: [batches + 1] int64; batch b is order[bounds[b] : bounds[b + 1]].
        config: of the loader.
    """

    epoch: int
    order: Ints
    starts: Ints
    lengths: Ints
    bounds: Ints
    config: LoaderConfig

    def batch(self, index: int) -> Ints:
        """The rows of a global batch."""
        return self.order[self.bounds[index] : self.bounds[index + 1]]

    def share(self, index: int, rank: int, ranks: int) -> Ints:
        """The rows of a global batch that a rank trains on, in the batch's order."""
        batch = self.batch(index)
        mine: Ints = batch[owners_of(self._costs(batch), ranks, self.config.batching) == rank]
        return mine

    def imbalance(self, index: int, ranks: int) -> Imbalance:
        """How evenly a global batch is shared out among ranks."""
        costs = self._costs(self.batch(index))
        return Imbalance(
            before=imbalance(costs, in_turns(costs, ranks), ranks),
            after=imbalance(costs, owners_of(costs, ranks, self.config.batching), ranks),
            bound=largest_item_bound(costs, ranks),
        )

    def _costs(self, rows: Ints) -> Floats:
        return self.config.cost.of(self.lengths[rows])


def random_starts(rows: Rows, seed: int, epoch: int) -> Ints:
    """[R] int64, where each row's inputs begin if any that follow each other will do, all equally likely.

    Args:
        rows: of a split, with their most recent inputs.
        seed: with `epoch` and a row's sequence, decides.
        epoch: >= 0.
    """
    choices = rows.starts + 1
    starts: Ints = (uniform(words(rows.sequences, seed, epoch, _WINDOWS)) * choices).astype(np.int64)
    return starts


def owners_of(costs: Floats, ranks: int, config: BatchingConfig) -> Ints:
    """[B] int64, the rank of every sequence of a global batch, from their costs."""
    if ranks == 1:
        return np.zeros(len(costs), dtype=np.int64)
    match config.balance:
        case "none":
            return in_turns(costs, ranks)
        case "counts":
            return by_cost_and_count(costs, ranks)
        case "cost":
            return by_cost(costs, ranks)


def equal_cost_bounds(costs: Floats, num_batches: int) -> Ints:
    """Cuts a row of sequences into runs of about the same cost, none of them empty.

    Args:
        costs: [R] > 0, in order.
        num_batches: at most R.

    Returns:
        [num_batches + 1] int64, from 0 to R. Every run costs the mean, give or take the costliest sequence, unless
        that is more than a whole run.
    """
    ends = np.cumsum(costs)
    shares = np.arange(1, num_batches) * (ends[-1] / num_batches) if num_batches else np.empty(0)
    # a sequence belongs where its middle lies
    inner = np.searchsorted(ends - costs / 2, shares)
    bounds = np.concatenate(([0], inner, [len(costs)])) if num_batches else np.zeros(1, dtype=np.int64)
    steps = np.arange(num_batches + 1)
    bounds = np.maximum.accumulate(bounds - steps) + steps
    result: Ints = np.minimum(bounds, len(costs) - steps[::-1])
    return result
