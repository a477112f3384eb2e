"""Pictures of a scaling study: laws among their runs, and the models of each budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hstu_dist.report.plots import save_figure
from hstu_dist.scaling.law import Fit
from hstu_dist.scaling.optimum import Optimum, budgets
from hstu_dist.scaling.study import Family, Study, kind_of

_POINTS = 100


def save_study(study: Study, stem: Path) -> tuple[Path, ...]:
    """Draws the laws to STEM and the budgets of iso-FLOP sweeps to STEM_by_size, where the study has them.

    Returns:
        Paths of PNG and SVG.
    """
    drawn: tuple[Path, ...] = ()
    if any(family.fit is not None for family in study.families):
        drawn += save_figure(_laws(study), stem)
    if any(family.optima for family in study.families):
        drawn += save_figure(_budgets(study), stem.with_name(f"{stem.name}_by_size"))
    return drawn


def _laws(study: Study) -> Figure:
    """The metric against training compute; losses on two logarithmic axes."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, family in enumerate(study.families):
        if family.fit is not None:
            _law(axes, family, family.fit, f"C{index}")
    axes.set_xscale("log")
    if kind_of(study.metric) == "power":
        axes.set_yscale("log")
    axes.set_xlabel("FLOPs of training")
    axes.set_ylabel(study.metric)
    axes.set_title("stars: held out; bands: 90% intervals of the laws", fontsize=9)
    axes.legend(fontsize=8)
    return figure


def _law(axes: Axes, family: Family, fit: Fit, colour: str) -> None:
    runs = [(point.compute, point.metrics[family.metric]) for point in family.fitted]
    last = family.held_out
    ends = [compute for compute, _ in runs] + ([] if last is None else [last.compute])
    compute = np.geomspace(min(ends), 2 * max(ends), _POINTS)
    low, high = fit.interval(compute)
    axes.fill_between(compute, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(compute, fit.law.at(compute), color=colour, label=family.name)
    axes.scatter([x for x, _ in runs], [y for _, y in runs], color=colour, s=18)
    if last is not None:
        axes.scatter([last.compute], [last.measured], color=colour, s=90, marker="*", edgecolors="black")


def _budgets(study: Study) -> Figure:
    """The metric against the size of the model, a curve for each budget; a panel a family."""
    families = [family for family in study.families if family.optima]
    figure = Figure(figsize=(6.5, 4.5 * len(families)), layout="constrained")
    for axes, family in zip(figure.subplots(len(families), squeeze=False)[:, 0], families, strict=True):
        runs = budgets([point for point in study.points if point.family == family.name])
        for index, optimum in enumerate(family.optima):
            of_optimum = [abs(budget[0].compute - optimum.compute) for budget in runs]
            nearest = runs[of_optimum.index(min(of_optimum))]
            _budget(axes, optimum, [(run.parameters, run.metrics[study.metric]) for run in nearest], f"C{index}")
        axes.set_xscale("log")
        axes.set_xlabel("parameters of the tower")
        axes.set_ylabel(study.metric)
        axes.set_title(f"{family.name}: stars are optima that lie inside", fontsize=9)
        axes.legend(fontsize=8)
    return figure


def _budget(axes: Axes, optimum: Optimum, runs: list[tuple[float, float]], colour: str) -> None:
    """Draws one budget; `runs` are parameters and metric of each."""
    sizes = np.array([size for size, _ in runs])
    axes.scatter(sizes, [value for _, value in runs], color=colour, s=18)
    line = np.geomspace(sizes.min(), sizes.max(), _POINTS)
    axes.plot(line, np.polyval(optimum.parabola, np.log(line)), color=colour, label=f"{optimum.compute:.2g} FLOPs")
    if optimum.inside:
        axes.scatter([optimum.parameters], [optimum.loss], color=colour, s=90, marker="*", edgecolors="black")
