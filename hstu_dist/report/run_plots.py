"""Figures of run reports, as SVG to put into a page."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hstu_dist.report.plots import svg_of

_WIDTH = 4.6


def curves(panels: Mapping[str, Mapping[str, list[tuple[int, float]]]]) -> str:
    """Metrics over steps.

    Args:
        panels: metric → run → steps and values.
    """
    figure = Figure(figsize=(_WIDTH * len(panels), 3.2), layout="constrained")
    runs = dict.fromkeys(run for lines in panels.values() for run in lines)
    colours = {run: f"C{index % 10}" for index, run in enumerate(runs)}
    for panel, (metric, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for run, points in lines.items():
            steps, values = zip(*points, strict=True)
            marker = "." if len(points) < 60 else None
            panel.plot(steps, values, color=colours[run], label=run, linewidth=1.2, marker=marker)
        panel.set_title(metric, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    if len(runs) > 1:
        handles = [Line2D([], [], color=colour, label=run) for run, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower center", fontsize=8)
    return svg_of(figure)


def shares(parts: Mapping[str, Mapping[str, float]], title: str) -> str:
    """One bar a run, cut into its parts.

    Args:
        parts: run → part → amount; all runs have the same parts.
        title: what the amounts are.
    """
    figure = Figure(figsize=(2 * _WIDTH, 0.9 + 0.35 * len(parts)), layout="constrained")
    panel = figure.subplots()
    left = dict.fromkeys(parts, 0.0)
    for part in next(iter(parts.values())):
        values = [amounts[part] for amounts in parts.values()]
        bars = panel.barh(list(parts), values, left=list(left.values()), label=part)
        panel.bar_label(bars, [f"{value:,.1f}" for value in values], label_type="center", fontsize=8, color="white")
        left = {run: done + value for (run, done), value in zip(left.items(), values, strict=True)}
    panel.invert_yaxis()
    panel.set_xlabel(title, fontsize=8)
    panel.tick_params(labelsize=8)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return svg_of(figure)
