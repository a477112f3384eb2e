"""Stochastic Length: which long histories are cut this epoch, and to which of their events; no loop over sequences.

See `StochasticLengthConfig` for the law. Draws are hashes of (seed, epoch, sequence, position), so that any process
can make any part of them in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hstu_dist.data.config import StochasticLengthConfig
from hstu_dist.data.draws import GOLDEN, Floats, Ints, Words, mix, uniform, words

_KEY_BITS = 31
"""Bits of a float32 without its sign; positive floats are in the order of their bits."""


@dataclass(frozen=True, kw_only=True)
class History:
    """B histories as they lie in the flat arrays of a data set.

    Attributes:
        sequences: [B] int64, which sequence of the data set each is.
        firsts: [B] int64, index of its first event.
        lengths: [B] int64 >= 1, inputs before anything is cut.
        kept: [B] int64, 1 to lengths, inputs after that.
    """

    sequences: Ints
    firsts: Ints
    lengths: Ints
    kept: Ints


class StochasticLength:
    """The law of one run."""

    def __init__(self, config: StochasticLengthConfig, max_length: int, seed: int) -> None:
        """`max_length` is N where the configuration leaves it open."""
        self.config = config
        self.seed = seed
        self.cut_length = max(1, round((config.max_length or max_length) ** (config.alpha / 2)))

    def keep_probability(self, lengths: Ints) -> Floats:
        """[B] float64, how likely a history is kept whole."""
        probability: Floats = np.minimum(1.0, self.cut_length / lengths.astype(np.float64)) ** 2
        return probability

    def kept_lengths(self, sequences: Ints, lengths: Ints, epoch: int) -> Ints:
        """Inputs kept of every history in an epoch.

        Args:
            sequences: [B] which sequence of the data set each is.
            lengths: [B] its inputs.
            epoch: >= 0.

        Returns:
            [B] int64.
        """
        drawn = uniform(mix(words(sequences, self.seed, epoch)))
        return np.where(drawn < self.keep_probability(lengths), lengths, np.minimum(lengths, self.cut_length))

    def events(self, history: History, timestamps: Ints, epoch: int) -> Ints:
        """Which events are inputs.

        Args:
            history: what to choose from, with `kept` as `kept_lengths` gave it.
            timestamps: [E] of all events of the data set.
            epoch: >= 0.

        Returns:
            [sum of kept] int64, indices of events, ascending within a history.
        """
        if self.config.selection == "greedy":
            return spans(history.firsts + history.lengths - history.kept, history.kept)
        is_cut = history.kept < history.lengths
        cut = History(
            sequences=history.sequences[is_cut],
            firsts=history.firsts[is_cut],
            lengths=history.lengths[is_cut],
            kept=history.kept[is_cut],
        )
        starts = np.cumsum(history.kept) - history.kept
        events = np.empty(int(history.kept.sum()), dtype=np.int64)
        events[spans(starts[~is_cut], history.kept[~is_cut])] = spans(history.firsts[~is_cut], history.kept[~is_cut])
        if len(cut.kept):
            events[spans(starts[is_cut], cut.kept)] = self._subsequences(cut, timestamps, epoch)
        return events

    def _subsequences(self, history: History, timestamps: Ints, epoch: int) -> Ints:
        """The `kept` events with the smallest keys of every history."""
        events = spans(history.firsts, history.lengths)
        starts = np.cumsum(history.lengths) - history.lengths
        owners = np.repeat(np.arange(len(starts)), history.lengths)
        positions = np.arange(len(events)) - starts[owners]
        noise = mix(words(history.sequences, self.seed, epoch)[owners] + (positions + 1).astype(np.uint64) * GOLDEN)
        if self.config.selection == "weighted":
            keys = _race(noise, _recency_weights(timestamps[events], starts, history.lengths))
        else:
            keys = (noise >> np.uint64(64 - _KEY_BITS)).astype(np.int64)
        # one sort of plain integers is several times faster than an argsort; positions also make them distinct
        position_bits = int(history.lengths.max()).bit_length()
        key_bits = min(_KEY_BITS, 63 - position_bits - len(starts).bit_length())
        keys >>= _KEY_BITS - key_bits
        packed = np.sort(owners << (key_bits + position_bits) | keys << position_bits | positions)
        smallest = packed[spans(starts, history.kept)] & ((1 << position_bits) - 1)
        chosen = np.zeros(len(events), dtype=np.bool_)
        chosen[smallest + np.repeat(starts, history.kept)] = True
        return events[chosen]


def spans(firsts: Ints, lengths: Ints) -> Ints:
    """firsts[0], firsts[0] + 1, ... (lengths[0] of them), firsts[1], ...; [sum of lengths] int64."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    result: Ints = np.arange(total) + np.repeat(firsts - (ends - lengths), lengths)
    return result


def _recency_weights(times: Ints, starts: Ints, lengths: Ints) -> Floats:
    """1 - f / (sum of f) of every input, f the time from it to the last input of its history."""
    age = np.repeat(times[starts + lengths - 1], lengths) - times
    total = np.add.reduceat(age, starts)
    weights: Floats = 1.0 - age / np.repeat(np.maximum(total, 1), lengths)
    return weights


def _race(noise: Words, weights: Floats) -> Ints:
    """Keys whose smallest k are a draw of k without replacement: exponential arrival times, ordered as integers."""
    arrivals = -np.log(uniform(noise)) / np.maximum(weights, 1e-30)
    keys: Ints = arrivals.astype(np.float32).view(np.int32).astype(np.int64)
    return keys
