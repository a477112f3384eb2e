"""A scaling study: a law for every family of runs, tested on its largest run, as JSON, rows and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hstu_dist.errors import UserError
from hstu_dist.scaling.law import LEAST_SIZES, Fit, Floats, Kind, LogLaw, PowerLaw, fit_law
from hstu_dist.scaling.optimum import Growth, Optimum, budgets, growth, optima
from hstu_dist.scaling.points import Accepted, Point

_SAME_SIZE = 1e-3
_FALLING = ("/ne", "/log_loss", "/mse", "/mae")
"""What the metrics of a head end with of which less is better."""


def kind_of(metric: str) -> Kind:
    """Losses, NE and errors fall towards a floor; hit rates and their like grow with the logarithm of compute."""
    return "power" if metric == "loss" or metric.endswith(_FALLING) else "logarithm"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The largest run, which the law was not fitted to.

    Attributes:
        runs: its names, one a seed.
        compute: FLOPs.
        measured: the metric, in mean over the seeds.
        predicted: by the law.
        low, high: 90% interval of the curve there.
    """

    runs: tuple[str, ...]
    compute: float
    measured: float
    predicted: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True, kw_only=True)
class Family:
    """Runs that lie on one curve.

    Attributes:
        name: of the family.
        metric: what was fitted.
        fitted: points that the law was fitted to.
        held_out: the largest; None: too few sizes to spare one.
        fit: the law; None: too few budgets for one, as an iso-FLOP sweep may have.
        optima: iso-FLOP optima.
        growth: of the optima.
    """

    name: str
    metric: str
    fitted: tuple[Point, ...]
    held_out: HeldOut | None
    fit: Fit | None
    optima: tuple[Optimum, ...]
    growth: Growth | None

    @classmethod
    def of(cls, name: str, points: Sequence[Point], metric: str) -> Family:
        """Fits the points of a family; its iso-FLOP budgets count by their best model."""
        losses = metric if kind_of(metric) == "power" else None
        best = optima(points, losses) if losses else []
        used = _frontier(points, metric)
        sizes = _sizes(used)
        spare = len(sizes) > LEAST_SIZES
        largest = sizes[-1] * (1 - _SAME_SIZE) if spare else math.inf
        size_of = _compute_of_cells(used)
        fitted = [p for p in used if size_of[p.cell] < largest]
        fit = fit_law(kind_of(metric), *_columns(fitted, metric)) if len(sizes) >= LEAST_SIZES else None
        last = _held_out([p for p in used if p not in fitted], metric, fit) if spare and fit is not None else None
        return cls(
            name=name,
            metric=metric,
            fitted=tuple(fitted),
            held_out=last,
            fit=fit,
            optima=tuple(best),
            growth=growth(best),
        )

    def document(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "family": self.name,
            "metric": self.metric,
            **_law_document(self.metric, self.fit),
            "runs": [point.run for point in self.fitted],
            "held_out": None if self.held_out is None else {**asdict(self.held_out), "error": self.held_out.error},
            "optima": [asdict(optimum) for optimum in self.optima],
            "growth": None if self.growth is None else asdict(self.growth),
        }


@dataclass(frozen=True)
class Study:
    """All families of a sweep, in one metric.

    Attributes:
        metric: what was fitted.
        families: by name.
        excluded: a line about each run that was left out.
        points: all that took part.
    """

    metric: str
    families: tuple[Family, ...]
    excluded: tuple[str, ...]
    points: tuple[Point, ...]

    @classmethod
    def of(cls, accepted: Accepted, metric: str) -> Study:
        """Fits every family that has enough sizes; a line says which has not.

        Raises:
            UserError: none has.
        """
        families, excluded = [], list(accepted.excluded)
        for name in dict.fromkeys(point.family for point in accepted.points):
            family = Family.of(name, [point for point in accepted.points if point.family == name], metric)
            if family.fit is None and not family.optima:
                sizes = len(_sizes(family.fitted))
                excluded.append(f"{name}: not fitted, has {sizes} sizes, expected at least {LEAST_SIZES}")
            else:
                families.append(family)
        if not families:
            raise UserError(
                f"scale fit: no curve to fit ({'; '.join(excluded)})",
                f"finish cells of at least {LEAST_SIZES} sizes of one experiment",
            )
        return cls(metric, tuple(families), tuple(excluded), accepted.points)

    def document(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "metric": self.metric,
            "families": [family.document() for family in self.families],
            "excluded": list(self.excluded),
            "points": [asdict(point) for point in self.points],
        }

    def markdown(self) -> str:
        """The report."""
        lines = [f"# Scaling of {self.metric}", "", "| family | law | R² | held out | predicted | error |"]
        lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
        lines += [_family_line(family) for family in self.families]
        lines += ["", "Intervals are 90%, from refits to resampled residuals; C in FLOPs of training.", ""]
        lines += ["| run | family | FLOPs | parameters | tokens | " + self.metric + " |"]
        lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
        lines += [
            f"| {p.run} | {p.family} | {p.compute:.3g} | {p.parameters:,} | {p.tokens:.3g} "
            f"| {p.metrics[self.metric]:.4f} |"
            for p in self.points
        ]
        lines += [line for family in self.families if family.optima for line in _optimum_lines(family)]
        if self.excluded:
            lines += ["", "Left out:", "", *(f"- {line}" for line in self.excluded)]
        return "\n".join(lines) + "\n"


def _law_document(metric: str, fit: Fit | None) -> dict[str, Any]:
    if fit is None:
        return {"law": None}
    names = fit.law.parameters
    return {
        "law": kind_of(metric),
        "parameters": names,
        "intervals": {name: fit.parameter_interval(name) for name in names},
        "resampled": [other.parameters for other in fit.resampled],
        "r_squared": fit.r_squared,
    }


def law_of(document: dict[str, Any], parameters: dict[str, float]) -> PowerLaw | LogLaw:
    """A law from what `Family.document` says of it."""
    unit = parameters["unit"]
    if document["law"] == "power":
        return PowerLaw(parameters["E"], parameters["A"], parameters["beta"], unit)
    return LogLaw(parameters["a"], parameters["b"], unit)


def _columns(points: Sequence[Point], metric: str) -> tuple[Floats, Floats]:
    return np.array([p.compute for p in points]), np.array([p.metrics[metric] for p in points])


def _compute_of_cells(points: Sequence[Point]) -> dict[str, float]:
    """Geometric mean over the seeds of each cell, which may have drawn or stopped differently."""
    logs: dict[str, list[float]] = {}
    for point in points:
        logs.setdefault(point.cell, []).append(math.log(point.compute))
    return {cell: math.exp(sum(values) / len(values)) for cell, values in logs.items()}


def _sizes(points: Sequence[Point]) -> list[float]:
    """Computes of cells that differ by more than rounding."""
    found: list[float] = []
    for compute in sorted(_compute_of_cells(points).values()):
        if not found or compute > found[-1] * (1 + _SAME_SIZE):
            found.append(compute)
    return found


def _frontier(points: Sequence[Point], metric: str) -> list[Point]:
    """Of budgets with several models, the best of them; seeds of one model all count."""
    best = min if kind_of(metric) == "power" else max
    found = []
    for budget in budgets(points):
        models = {point.parameters for point in budget}
        chosen = best(budget, key=lambda point: point.metrics[metric]).parameters if len(models) > 1 else None
        found += [point for point in budget if chosen in (None, point.parameters)]
    return found


def _held_out(points: Sequence[Point], metric: str, fit: Fit) -> HeldOut:
    compute, values = _columns(points, metric)
    where = np.array([float(np.exp(np.log(compute).mean()))])
    low, high = fit.interval(where)
    return HeldOut(
        runs=tuple(point.run for point in points),
        compute=float(where[0]),
        measured=float(values.mean()),
        predicted=float(fit.law.at(where)[0]),
        low=float(low[0]),
        high=float(high[0]),
    )


def _family_line(family: Family) -> str:
    if family.fit is None:
        return f"| {family.name} | none: {len(_sizes(family.fitted))} budgets, {LEAST_SIZES} are needed | | | | |"
    parts = []
    for name, value in family.fit.law.parameters.items():
        low, high = family.fit.parameter_interval(name)
        parts.append(f"{name} = {value:.4g}" + ("" if name == "unit" else f" ({low:.4g} to {high:.4g})"))
    last = family.held_out
    shown = (
        " | | |"
        if last is None
        else (
            f" {last.measured:.4f} at {last.compute:.3g} | {last.predicted:.4f} ({last.low:.4f} to {last.high:.4f}) "
            f"| {last.error:+.2%} |"
        )
    )
    return f"| {family.name} | {', '.join(parts)} | {family.fit.r_squared:.4f} |{shown}"


def _optimum_lines(family: Family) -> list[str]:
    lines = ["", f"Iso-FLOP optimum of {family.name}:", "", "| FLOPs | parameters | tokens | loss | inside |"]
    lines.append("| ---: | ---: | ---: | ---: | --- |")
    lines += [
        f"| {o.compute:.3g} | {o.parameters:,.0f} | {o.tokens:.3g} | {o.loss:.4f} | {'yes' if o.inside else 'no'} |"
        for o in family.optima
    ]
    if family.growth is not None:
        lines += ["", f"parameters ∝ C^{family.growth.parameters:.2f}, tokens ∝ C^{family.growth.tokens:.2f}"]
    return lines
