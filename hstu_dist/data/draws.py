"""Random numbers of sequences: hashes of (seed, epoch, use, sequence), so that any process can draw any of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def words(sequences: Ints, *key: int) -> Words:
    """[B] a random number of every sequence, all 2^64 equally likely.

    Args:
        sequences: [B], which sequence of the data set each is.
        key: seed, epoch and, for more than one use in an epoch, a number of the use; all >= 0.
    """
    state = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)
    return mix(sequences.astype(np.uint64) * GOLDEN + state)


def uniform(values: Words) -> Floats:
    """Numbers in (0, 1)."""
    return ((values >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def mix(x: Words) -> Words:
    """splitmix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
