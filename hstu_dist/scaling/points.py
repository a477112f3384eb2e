"""Finished runs as points of a study, and which of them may not take part."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hstu_dist.errors import UserError
from hstu_dist.scaling.law import LEAST_SIZES


@dataclass(frozen=True, kw_only=True)
class Point:
    """One finished run.

    Attributes:
        run: its name.
        family: what is compared, such as an experiment.
        settings: all that makes it what it is, but its name, as JSON: of two runs with the same settings one counts.
        data: what makes its data set, as text.
        made_from: hash of what its prepared data was made from; empty: the run left no record of it.
        seed: of the run.
        compute: FLOPs of training.
        parameters: of the tower.
        tokens: inputs that it trained on.
        seconds: of training.
        metrics: of the test split.
        date: when it was started, ISO 8601, UTC.
        commit: of the code that trained it.
    """

    run: str
    family: str
    settings: str
    data: str
    made_from: str
    seed: int
    compute: float
    parameters: int
    tokens: float
    seconds: float
    metrics: dict[str, float]
    date: str
    commit: str

    @property
    def cell(self) -> str:
        """The settings without the seed: runs of the same cell are of one size, whatever their seeds drew."""
        return json.dumps({name: value for name, value in json.loads(self.settings).items() if name != "seed"})


@dataclass(frozen=True)
class Accepted:
    """Points that a metric can be fitted to, and a line about each that was left out."""

    points: tuple[Point, ...]
    excluded: tuple[str, ...]


def accept(points: Iterable[Point], metric: str) -> Accepted:
    """Leaves out what is broken.

    Args:
        points: of one sweep.
        metric: to be fitted.

    Raises:
        UserError: the runs are of different data sets, none has the metric, or too few are left.
    """
    kept: list[Point] = []
    excluded: list[str] = []
    seen: dict[str, str] = {}
    for point in sorted(points, key=lambda p: (p.family, p.compute, p.seed, p.run)):
        value = point.metrics.get(metric)
        if value is None:
            excluded.append(f"{point.run}: excluded, has no metric {metric}")
        elif not math.isfinite(value) or not math.isfinite(point.compute) or point.compute <= 0:
            excluded.append(f"{point.run}: excluded, its {metric} is {value} after {point.compute:.3g} FLOPs")
        elif point.settings in seen:
            excluded.append(f"{point.run}: excluded, repeats {seen[point.settings]} with the same settings and seed")
        else:
            seen[point.settings] = point.run
            kept.append(point)
    _check_data(kept)
    if len(kept) < LEAST_SIZES:
        why = f" ({'; '.join(excluded)})" if excluded else ""
        raise UserError(
            f"scale fit: got {len(kept)} finished cells with {metric}, expected at least {LEAST_SIZES}{why}",
            "finish the sweep: the same `python -m launch --multirun` command goes on",
        )
    return Accepted(tuple(kept), tuple(excluded))


def _check_data(points: Sequence[Point]) -> None:
    _check_same([(point.data, point.run) for point in points])
    _check_same([(point.made_from, point.run) for point in points if point.made_from])


def _check_same(pairs: Iterable[tuple[str, str]]) -> None:
    of_data: dict[str, str] = {}
    for data, run in pairs:
        of_data.setdefault(data, run)
    if len(of_data) > 1:
        (first, one), (second, other), *_ = of_data.items()
        raise UserError(
            f"scale fit: {one} and {other} were trained on different data sets ({first} and {second})",
            "give a sweep of one data set: losses of different ones lie on no common curve",
        )
