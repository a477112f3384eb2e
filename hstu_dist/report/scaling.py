"""Picture of a scaling study: runs, laws with their intervals, and the held-out runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hstu_dist.report.plots import Curve, save_laws
from hstu_dist.scaling.study import Family, Study, kind_of

_POINTS = 100


def save_study(study: Study, stem: Path) -> tuple[Path, Path]:
    """Draws all families against training compute; losses on two logarithmic axes.

    Returns:
        Paths of PNG and SVG.
    """
    curves = [_curve(family) for family in study.families]
    return save_laws(curves, study.metric, kind_of(study.metric) == "power", stem)


def _curve(family: Family) -> Curve:
    runs = [(point.compute, point.metrics[family.metric]) for point in family.fitted]
    last = family.held_out
    held_out = None if last is None else (last.compute, last.measured)
    ends = [compute for compute, _ in [*runs, *([] if held_out is None else [held_out])]]
    compute = np.geomspace(min(ends), 2 * max(ends), _POINTS)
    low, high = family.fit.interval(compute)
    return Curve(family.name, runs, held_out, compute, family.fit.law.at(compute), low, high)
