"""Stateless random numbers: a function of (seed, step, token, column) and of nothing else.

No generator state exists, so nothing needs saving for an exact resume, and a token draws the same
numbers whichever rank it lands on: runs at different world sizes stay comparable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN_64 = 0x9E3779B97F4A7C15
_GOLDEN_32 = 0x9E3779B1
_WORD = (1 << 64) - 1


def fold(*numbers: int) -> int:
    """One signed 64-bit key from several integers, order mattering (splitmix64 of each in turn)."""
    key = 0
    for number in numbers:
        key = (key + (number & _WORD) + _GOLDEN_64) & _WORD
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _WORD
        key ^= key >> 31
    return key - (1 << 64) if key >> 63 else key


def _signed32(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


_MULTIPLIERS_64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def mix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser, a bijection; int64 products wrap as wanted, shifts are made logical by a mask."""
    x = x ^ ((x >> 30) & ((1 << 34) - 1))
    x = x * (_MULTIPLIERS_64[0] - (1 << 64))
    x = x ^ ((x >> 27) & ((1 << 37) - 1))
    x = x * (_MULTIPLIERS_64[1] - (1 << 64))
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def unmix64(x: Tensor) -> Tensor:
    """What `mix64` made `x` of."""
    for shift, multiplier in ((31, _MULTIPLIERS_64[1]), (27, _MULTIPLIERS_64[0]), (30, 1)):
        # x ^ (x >> shift) is undone by shifting on until nothing is left
        y = x
        for _ in range(64 // shift):
            y = x ^ ((y >> shift) & ((1 << (64 - shift)) - 1))
        inverse = pow(multiplier, -1, 1 << 64)
        x = y * (inverse - (1 << 64) if inverse >> 63 else inverse)
    return x


def _mix32_(x: Tensor, salt: Tensor) -> Tensor:
    """A 32-bit integer hash in place (two multiplications, bias below 0.2 bits); each salt gives another one."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= salt
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


@dataclass(frozen=True)
class TokenNoise:
    """The random numbers of one training step.

    Attributes:
        key: `fold(seed, step, ...)`, equal on all ranks.
        tokens: [T] int64, world-size-independent identity of each token.
    """

    key: int
    tokens: Tensor

    def stream(self, name: int) -> TokenNoise:
        """Independent numbers for another use in the same step."""
        return TokenNoise(fold(self.key, name), self.tokens)

    def words(self, count: int) -> Tensor:
        """[T, count] int32, all 2^32 values equally likely."""
        rows = mix64(self.tokens + self.key)
        # all 64 bits: of 2^24 table rows, 2^15 pairs would agree in 32 bits and start out equal
        low, high = rows.to(torch.int32), (rows >> 32).to(torch.int32)
        steps = torch.arange(1, count + 1, device=self.tokens.device).mul_(_GOLDEN_32).to(torch.int32)
        return _mix32_(low[:, None] + steps[None, :], high[:, None])

    def integers(self, count: int, high: int) -> Tensor:
        """[T, count] int64 uniform in [0, high); relative bias below high / 2^31, above 2^20 below high / 2^62.

        Raises:
            ValueError: `high` is not in [1, 2^61].
        """
        if not 1 <= high <= 1 << 61:
            raise ValueError(f"high: got {high}, expected 1 <= high <= 2^61")
        low = self.words(count).to(torch.int64).bitwise_and_(0x7FFFFFFF)
        if high <= 1 << 20:
            return low.mul_(high) >> 31
        upper = self.stream(1).words(count).to(torch.int64).bitwise_and_(0x7FFFFFFF)
        return ((upper << 31) | low) % high

    def truncated_normal(self, count: int) -> Tensor:
        """[T, count] float32, standard normal cut at two standard deviations (by inverting its CDF)."""
        # CDF of the normal at -2 and the mass between -2 and 2
        low, mass = 0.022750131948179195, 0.9544997361036416
        uniform = (self.words(count).to(torch.float64) + (2**31 + 0.5)) / 2**32
        quantiles: Tensor = torch.special.ndtri(uniform.mul_(mass).add_(low))
        return quantiles.to(torch.float32)

    def uniform(self, count: int) -> Tensor:
        """[T, count] float32, uniform with mean 0 and standard deviation 1."""
        unit = (self.words(count).to(torch.float64) + 0.5) / 2**31
        return unit.mul_(math.sqrt(3)).to(torch.float32)


@dataclass(frozen=True)
class Drop:
    """Dropout of one use in a step: each element is zeroed with probability `rate`, the rest scaled by 1 / (1 - rate).

    Attributes:
        noise: the numbers that decide.
        rate: in (0, 1).
    """

    noise: TokenNoise
    rate: float

    @property
    def threshold(self) -> int:
        """Elements whose word is below it are dropped."""
        return int(self.rate * 2**32) - (1 << 31)

    @property
    def scale(self) -> float:
        """Factor of the elements that stay."""
        return 1.0 / (1.0 - self.rate)
