"""Laws of training compute C: E + A·C^-beta for losses, a + b·ln C for hit rates; robust fits with bootstrap intervals.

Both are fitted by least squares with a Huber loss, of logarithms for losses, so that a run that went wrong does not
decide. Intervals are percentiles over refits to resampled residuals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

Floats = npt.NDArray[np.float64]

Kind = Literal["power", "logarithm"]
LEAST_SIZES = 4
"""Distinct sizes without which no law with three parameters can be told from another."""
_HUBER = 3e-3
"""Residual from which on a run counts less: relative for losses, absolute for hit rates."""
_EXPONENTS = (0.05, 0.15, 0.3, 0.6)
_FLOORS = (0.1, 0.5, 0.8, 0.95)
_FEWEST_RESAMPLES = 20


class Law(Protocol):
    """A fitted curve."""

    @property
    def parameters(self) -> dict[str, float]:
        """By name."""

    def at(self, compute: Floats) -> Floats:
        """What it predicts for FLOPs of training."""

    def compute_for(self, value: float) -> float:
        """FLOPs at which it predicts a value; inf: it never does."""


@dataclass(frozen=True)
class PowerLaw:
    """E + A·(C / unit)^-beta.

    Attributes:
        floor: E, the loss that remains.
        scale: A, what compute `unit` leaves above it.
        exponent: beta > 0.
        unit: FLOPs.
    """

    floor: float
    scale: float
    exponent: float
    unit: float

    @property
    def parameters(self) -> dict[str, float]:
        """E, A at the unit, beta, and the unit."""
        return {"E": self.floor, "A": self.scale, "beta": self.exponent, "unit": self.unit}

    def at(self, compute: Floats) -> Floats:
        """Loss at so many FLOPs."""
        found: Floats = self.floor + self.scale * (compute / self.unit) ** -self.exponent
        return found

    def compute_for(self, value: float) -> float:
        """FLOPs at which the loss is reached; inf: it is not above the floor."""
        if value <= self.floor:
            return math.inf
        logarithm = math.log(self.unit) + math.log(self.scale / (value - self.floor)) / self.exponent
        return math.exp(logarithm) if logarithm < 700 else math.inf


@dataclass(frozen=True)
class LogLaw:
    """a + b·ln(C / unit).

    Attributes:
        level: a, the value at compute `unit`.
        slope: b.
        unit: FLOPs.
    """

    level: float
    slope: float
    unit: float

    @property
    def parameters(self) -> dict[str, float]:
        """A, b, and the unit."""
        return {"a": self.level, "b": self.slope, "unit": self.unit}

    def at(self, compute: Floats) -> Floats:
        """Value at so many FLOPs."""
        found: Floats = self.level + self.slope * np.log(compute / self.unit)
        return found

    def compute_for(self, value: float) -> float:
        """FLOPs at which the value is reached; inf: the line does not rise to it."""
        if self.slope <= 0:
            return math.inf
        logarithm = math.log(self.unit) + (value - self.level) / self.slope
        return math.exp(logarithm) if logarithm < 700 else math.inf


@dataclass(frozen=True)
class Fit:
    """A law, and what refits to resampled residuals gave.

    Attributes:
        law: the best.
        resampled: the others.
        r_squared: share of the variance of the values that the law explains.
    """

    law: Law
    resampled: tuple[Law, ...]
    r_squared: float

    def interval(self, compute: Floats, coverage: float = 0.9) -> tuple[Floats, Floats]:
        """Lower and upper bounds of the curve at so many FLOPs."""
        curves = np.stack([law.at(compute) for law in self.resampled])
        low, high = np.quantile(curves, [(1 - coverage) / 2, (1 + coverage) / 2], axis=0)
        return low, high

    def parameter_interval(self, name: str, coverage: float = 0.9) -> tuple[float, float]:
        """Lower and upper bound of a parameter."""
        values = [law.parameters[name] for law in self.resampled]
        low, high = np.quantile(values, [(1 - coverage) / 2, (1 + coverage) / 2])
        return float(low), float(high)


def fit_law(kind: Kind, compute: Floats, values: Floats, resamples: int = 200, seed: int = 0) -> Fit:
    """Fits a law and its intervals.

    Args:
        kind: power for losses, logarithm for hit rates.
        compute: [n] FLOPs > 0, at least LEAST_SIZES of them different.
        values: [n], losses > 0.
        resamples: refits.
        seed: of resampling.

    Raises:
        ValueError: too few sizes.
    """
    if len(np.unique(compute)) < LEAST_SIZES or resamples < _FEWEST_RESAMPLES:
        raise ValueError(f"fit_law: got {len(np.unique(compute))} sizes and {resamples} resamples")
    unit = float(np.exp(np.log(compute).mean()))
    law = _fit(kind, compute, values, unit, None)
    predicted = law.at(compute)
    freedom = math.sqrt(len(values) / max(1, len(values) - len(law.parameters) + 1))
    residuals = freedom * (np.log(values / predicted) if kind == "power" else values - predicted)
    random = np.random.default_rng(seed)
    others = []
    for _ in range(resamples):
        drawn = residuals[random.integers(len(values), size=len(values))]
        again = predicted * np.exp(drawn) if kind == "power" else predicted + drawn
        others.append(_fit(kind, compute, again, unit, law))
    variance = float(((values - values.mean()) ** 2).sum())
    explained = 1 - float(((values - predicted) ** 2).sum()) / variance if variance else math.nan
    return Fit(law, tuple(others), explained)


def _fit(kind: Kind, compute: Floats, values: Floats, unit: float, start: Law | None) -> Law:
    """The best law; from one start, or from many where there is none."""
    if kind == "logarithm":
        return _fit_line(compute, values, unit)
    lowest = float(values.min())
    if isinstance(start, PowerLaw):
        starts = [(start.floor, start.scale, start.exponent)]
    else:
        top = float(values.max())
        starts = [(f * lowest, max(top - f * lowest, 1e-9), beta) for f in _FLOORS for beta in _EXPONENTS]
    best = min((_descend(compute / unit, values, one) for one in starts), key=lambda found: found[0])
    floor, scale, exponent = (float(value) for value in np.exp(best[1]))
    return PowerLaw(floor, scale, exponent, unit)


def _descend(relative: Floats, values: Floats, start: tuple[float, float, float]) -> tuple[float, Floats]:
    """Cost, and logarithms of E, A and beta."""

    def residuals(logarithms: Floats) -> Floats:
        floor, scale, exponent = np.exp(logarithms)
        found: Floats = np.log(floor + scale * relative**-exponent) - np.log(values)
        return found

    # logarithms keep all three positive; the bounds keep exp within floating point
    bounds = ([-30.0, -30.0, -7.0], [30.0, 30.0, 2.0])
    inside = np.clip(np.log(np.maximum(start, 1e-12)), np.add(bounds[0], 1e-6), np.subtract(bounds[1], 1e-6))
    found = least_squares(residuals, inside, bounds=bounds, loss="huber", f_scale=_HUBER, x_scale="jac")
    return float(found.cost), found.x


def _fit_line(compute: Floats, values: Floats, unit: float) -> LogLaw:
    logarithms = np.log(compute / unit)
    found = least_squares(
        lambda line: line[0] + line[1] * logarithms - values,
        np.polyfit(logarithms, values, 1)[::-1],
        loss="huber",
        f_scale=_HUBER,
    )
    return LogLaw(float(found.x[0]), float(found.x[1]), unit)
