"""Generative training at a rate of 1/n: which sequences an epoch has; no loop over sequences.

A user with n events is as good as n training examples that share one computation. Emitting the whole sequence with
a probability proportional to 1/n makes an epoch cost of the order of N instead of N^2 in the longest length N (arXiv
2402.17152, section 2.3). Draws are hashes of (seed, epoch, sequence), so that any process can make any of them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hstu_dist.data.config import EmissionConfig
from hstu_dist.data.draws import Floats, Ints, uniform, words

_EMISSION = 2
"""Use of a sequence's random numbers; see `epoch` for the others."""


class Emission:
    """The law of one run on one data set."""

    def __init__(self, config: EmissionConfig, lengths: Ints, seed: int) -> None:
        """`lengths` [R] are the inputs of all sequences that could be emitted."""
        self.seed = seed
        self.scale = config.scale or _scale_of_share(config.share or 1.0, lengths)

    def probability(self, lengths: Ints) -> Floats:
        """[B] float64, how likely a sequence is part of an epoch."""
        probability: Floats = np.minimum(1.0, self.scale / np.maximum(lengths, 1))
        return probability

    def emitted(self, sequences: Ints, lengths: Ints, epoch: int) -> npt.NDArray[np.bool_]:
        """Which sequences an epoch has.

        Args:
            sequences: [B] identity of each.
            lengths: [B] its inputs.
            epoch: >= 0.

        Returns:
            [B] bool.
        """
        drawn = uniform(words(sequences, self.seed, epoch, _EMISSION))
        found: npt.NDArray[np.bool_] = drawn < self.probability(lengths)
        return found


def _scale_of_share(share: float, lengths: Ints) -> float:
    """The scale at which `share` of the sequences is emitted on average; the sum of min(1, s / n) is linear between
    two lengths, so that it is found exactly.
    """
    if not len(lengths):
        return 1.0
    n = np.sort(np.maximum(lengths, 1)).astype(np.float64)
    wanted = share * len(n)
    # at s = n[i] all shorter ones count 1 and the others s / n
    rest = np.cumsum((1.0 / n)[::-1])[::-1]
    sums = np.arange(len(n)) + n * rest
    first = min(int(np.searchsorted(sums, wanted)), len(n) - 1)
    return float((wanted - first) / rest[first])
