"""Made-up sequences with Zipf items and Zipf lengths, drawn as whole arrays from a counter-based generator."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hstu_dist.data.config import SyntheticZipfConfig
from hstu_dist.data.writer import Sequences, write_sequences

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_FIRST_SECOND = 1_500_000_000
_LONGEST_GAP = 7 * 24 * 3600
_NUM_ACTIONS = 5
_LENGTHS, _ITEMS, _GAPS, _ACTIONS = range(4)
"""Streams of random numbers: changing one leaves the others alone."""


class SyntheticZipf:
    """A synthetic data set as a source of finished sequences."""

    def __init__(self, config: SyntheticZipfConfig) -> None:
        self.config = config

    def fingerprint(self) -> dict[str, str]:
        """No inputs: the settings say everything."""
        return {}

    def write(self, folder: Path) -> None:
        """Vocabularies, Parquet and flat columns."""
        write_sequences(folder, self.read())

    def read(self) -> Sequences:
        """All sequences. Every item id below num_items is in the vocabulary, also those that nobody drew.

        Gaps between events have density 1/x up to a week, actions are 1 to 5.
        """
        config = self.config
        uniform = self._uniform(_LENGTHS, config.num_users)
        lengths = power_law(uniform, config.length_exponent, (config.min_events, config.max_events))
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        events = int(offsets[-1])
        ranks = power_law(self._uniform(_ITEMS, events), config.item_exponent, (1, config.num_items)) - 1
        gaps = power_law(self._uniform(_GAPS, events), 1.0, (1, _LONGEST_GAP))
        times = np.cumsum(gaps)
        times += np.repeat(_FIRST_SECOND - times[offsets[:-1]], lengths)
        actions = power_law(self._uniform(_ACTIONS, events), 0.0, (1, _NUM_ACTIONS))
        return Sequences(
            users=pa.array(np.arange(config.num_users)),
            items=pa.array(np.arange(config.num_items)),
            offsets=offsets,
            item_ids=scattered(ranks, config.num_items),
            timestamps=times,
            actions=actions.astype(np.int32),
        )

    def _uniform(self, stream: int, count: int) -> Floats:
        """Numbers in [0, 1), from raw bits: the methods of NumPy's generators may change between versions."""
        bits = np.random.Philox(np.random.SeedSequence([self.config.seed, stream])).random_raw(count)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def power_law(uniform: Floats, exponent: float, bounds: tuple[int, int]) -> Ints:
    """Integers low to high, both included, of density x^-exponent on [low, high + 1), rounded down.

    Args:
        uniform: numbers in [0, 1).
        exponent: >= 0.
        bounds: low >= 1 and high >= low.
    """
    low, high = bounds
    ratio = math.log((high + 1) / low)
    power = 1.0 - exponent
    # logarithm of the quantile, in a form that stays exact near exponent 1
    grown = uniform * ratio if power == 0 else np.log1p(uniform * math.expm1(power * ratio)) / power
    result: Ints = np.minimum((low * np.exp(grown)).astype(np.int64), high)
    return np.maximum(result, low)


def scattered(ranks: Ints, count: int) -> Ints:
    """The ranks in another order, one to one: the popular ones must not lie together on one shard.

    Args:
        ranks: in [0, count).
        count: at most 2^31.
    """
    step = int(count * 0.6180339887498949) | 1
    while math.gcd(step, count) != 1:
        step += 2
    return ranks * step % count
