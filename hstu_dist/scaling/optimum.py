"""Iso-FLOP optimum: at equal compute, the model size with the least loss, and how it grows with compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hstu_dist.scaling.points import Point

_SAME_BUDGET = 0.1
"""Relative difference of compute up to which runs count as of one budget."""
_LEAST_MODELS = 3


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best split of one budget.

    Attributes:
        compute: FLOPs.
        parameters: of the tower, at the vertex of a parabola of the loss over their logarithm.
        tokens: that the budget leaves for such a model.
        loss: there.
        inside: whether the vertex lies between the smallest and the largest model; otherwise the best model is given.
        parabola: its coefficients, highest power first, of the loss over the logarithm of the parameters.
    """

    compute: float
    parameters: float
    tokens: float
    loss: float
    inside: bool
    parabola: tuple[float, float, float]


@dataclass(frozen=True)
class Growth:
    """Exponents of parameters ∝ C^a and tokens ∝ C^b over the optima."""

    parameters: float
    tokens: float


def optima(points: Sequence[Point], metric: str) -> list[Optimum]:
    """One for each budget that has at least three models of one family; a smaller metric is better."""
    found = []
    for budget in budgets(points):
        sizes = sorted({point.parameters for point in budget})
        if len(sizes) < _LEAST_MODELS:
            continue
        size = np.log([point.parameters for point in budget])
        loss = np.array([point.metrics[metric] for point in budget])
        tokens = np.log([point.tokens for point in budget])
        a, b, c = np.polyfit(size, loss, 2)
        vertex = -b / (2 * a) if a > 0 else np.nan
        inside = bool(size.min() < vertex < size.max())
        best = vertex if inside else size[int(loss.argmin())]
        slope, level = np.polyfit(size, tokens, 1)
        found.append(
            Optimum(
                compute=float(np.exp(np.mean([np.log(point.compute) for point in budget]))),
                parameters=float(np.exp(best)),
                tokens=float(np.exp(level + slope * best)),
                loss=float(a * best**2 + b * best + c) if inside else float(loss.min()),
                inside=inside,
                parabola=(float(a), float(b), float(c)),
            )
        )
    return found


def growth(found: Sequence[Optimum]) -> Growth | None:
    """How the optimum moves; None: fewer than two budgets have one inside."""
    inside = [optimum for optimum in found if optimum.inside]
    if len(inside) < 2:
        return None
    compute = np.log([optimum.compute for optimum in inside])
    exponents = [
        float(np.polyfit(compute, np.log([getattr(optimum, name) for optimum in inside]), 1)[0])
        for name in ("parameters", "tokens")
    ]
    return Growth(*exponents)


def budgets(points: Sequence[Point]) -> list[list[Point]]:
    """Points by compute, ascending; neighbours of about the same compute are together."""
    found: list[list[Point]] = []
    for point in sorted(points, key=lambda p: p.compute):
        if found and point.compute <= found[-1][0].compute * (1 + _SAME_BUDGET):
            found[-1].append(point)
        else:
            found.append([point])
    return found
