"""64-bit hashes of NumPy arrays (splitmix64): random numbers without state."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(words: Words) -> Words:
    """splitmix64's finaliser, a bijection."""
    x = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fractions(words: Words) -> Floats:
    """Numbers in (0, 1)."""
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def sequence_words(sequences: Ints, seed: int, epoch: int) -> Words:
    """[B] a random word of every sequence in an epoch."""
    key = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    return mix(sequences.astype(np.uint64) * GOLDEN + key)
