"""Plots of result files: headless, PNG for reading and SVG for print, the same bytes for the same figures."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hstu_dist.files import write_atomically
from hstu_dist.report.results import Results

Curves = dict[str, dict[str, list[tuple[int, float]]]]
"""Metric → line → its points (epoch or the like, value)."""


def save_figure(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Writes `<stem>.png` and `<stem>.svg`.

    Returns:
        Both paths.
    """
    # a canvas of its own instead of pyplot: no window, no global state
    FigureCanvasAgg(figure)
    paths = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    for path in paths:
        content = io.BytesIO()
        # without salt and date every run would change the file
        with mpl.rc_context({"svg.hashsalt": stem.name}):
            figure.savefig(
                content,
                format=path.suffix[1:],
                dpi=150,
                bbox_inches="tight",
                metadata={"Date": None} if path.suffix == ".svg" else None,
            )
        write_atomically(path, content.getvalue())
    return paths


def svg_of(figure: Figure) -> str:
    """The figure as an `<svg>` element to put into a page of HTML."""
    FigureCanvasAgg(figure)
    content = io.StringIO()
    figure.savefig(content, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = content.getvalue()
    return svg[svg.index("<svg") :]


def save_bars(results: Results, metric: str, stem: Path) -> tuple[Path, Path]:
    """One panel per case, one bar per contender, its quartiles as a line.

    Args:
        results: what was measured.
        metric: which rows to draw.
        stem: where, without suffix.

    Returns:
        Paths of PNG and SVG.

    Raises:
        ValueError: no row has this metric.
    """
    rows = [row for row in results.rows if row.metric == metric]
    if not rows:
        raise ValueError(f"metric: got {metric!r}, expected one of {sorted({row.metric for row in results.rows})}")
    cases = list(dict.fromkeys(row.case for row in rows))
    counts = [sum(row.case == case for row in rows) for case in cases]
    figure = Figure(figsize=(8, 0.3 * sum(counts) + 0.7 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False, gridspec_kw={"height_ratios": counts})
    for panel, case in zip(panels[:, 0], cases, strict=True):
        drawn = [row for row in rows if row.case == case]
        panel.barh([row.contender for row in drawn], [row.value for row in drawn], color="#4878a8")
        # not as error bars: a mean may lie outside its quartiles
        panel.hlines(range(len(drawn)), [row.q25 for row in drawn], [row.q75 for row in drawn], color="black")
        panel.invert_yaxis()
        panel.set_title(case, loc="left", fontsize=9)
        panel.tick_params(labelsize=8)
    panels[-1, 0].set_xlabel(f"{metric} ({rows[0].unit})")
    figure.suptitle(f"{results.name} on {results.device}, commit {results.commit[:12]}", fontsize=9)
    return save_figure(figure, stem)


def save_curves(curves: Curves, title: str, stem: Path, over: str = "epoch") -> tuple[Path, Path]:
    """One panel per metric, one line per name; names that differ in their seed alone share a colour.

    Args:
        curves: what to draw.
        title: of the figure.
        stem: where, without suffix.
        over: what the points follow each other in.

    Returns:
        Paths of PNG and SVG.
    """
    figure = Figure(figsize=(4.5 * len(curves), 3.5), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (metric, lines) in zip(panels, curves.items(), strict=True):
        colours: dict[str, str] = {}
        for name, points in sorted(lines.items()):
            kind = re.sub(r"_seed\d+$", "", name)
            label = None if kind in colours else kind
            colour = colours.setdefault(kind, f"C{len(colours)}")
            panel.plot(*zip(*sorted(points), strict=True), color=colour, label=label, linewidth=1)
        panel.set_title(metric, fontsize=9)
        panel.set_xlabel(over, fontsize=8)
        panel.tick_params(labelsize=8)
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    return save_figure(figure, stem)


def save_prequential(
    times: Sequence[str],
    lines: Mapping[str, Mapping[str, Sequence[float]]],
    events: Sequence[float],
    title: str,
    stem: Path,
) -> tuple[Path, Path]:
    """A metric over the windows of a stream, one line a contender, and below it the events of each window.

    Args:
        times: [W] ISO times at which the windows begin.
        lines: the metric → contender → [W] values.
        events: [W].
        title: of the figure.
        stem: where, without suffix.

    Returns:
        Paths of PNG and SVG.
    """
    starts = [datetime.fromisoformat(time) for time in times]
    figure = Figure(figsize=(9, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    for metric, contenders in lines.items():
        for name, values in contenders.items():
            upper.plot(starts, values, label=name, linewidth=1, marker=".", markersize=3)
        upper.set_ylabel(metric)
    upper.set_ylim(bottom=0)
    upper.legend(fontsize=8)
    lower.step(starts, events, where="post", color="black", linewidth=1)
    lower.set_yscale("log")
    lower.set_ylabel("events")
    for panel in (upper, lower):
        panel.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=9)
    return save_figure(figure, stem)


def save_lines(
    panels: Mapping[str, Mapping[str, list[tuple[int, float]]]], labels: tuple[str, str, str], stem: Path
) -> tuple[Path, Path]:
    """One panel each, lines over sizes that double, both axes logarithmic, a dashed line at 1.

    Args:
        panels: title → line → its points.
        labels: title of the figure, of the sizes, of the values.
        stem: where, without suffix.

    Returns:
        Paths of PNG and SVG.
    """
    figure = Figure(figsize=(6 * max(1, len(panels)), 4.5), layout="constrained")
    columns = figure.subplots(1, max(1, len(panels)), squeeze=False, sharey=True)[0]
    title, sizes, values = labels
    for panel, (name, lines) in zip(columns, panels.items(), strict=False):
        for line, points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            panel.plot(x, y, marker="o", markersize=4, linewidth=1.2, label=f"{line}: {y[-1]:.1f}x at {x[-1]}")
        panel.axhline(1, color="black", linestyle="--", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}x")
        panel.set_title(name, fontsize=9)
        panel.set_xlabel(sizes, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    columns[0].set_ylabel(values, fontsize=8)
    figure.suptitle(title, fontsize=9)
    return save_figure(figure, stem)


def save_flame(boxes: Sequence[tuple[str, int, float, float]], title: str, stem: Path) -> tuple[Path, Path]:
    """Nested times as boxes, each below the one that it is a part of.

    Args:
        boxes: (name, depth, left edge, width), the outermost first; what is narrower than a 500th of it is left out.
        title: of the figure.
        stem: where, without suffix.

    Returns:
        Paths of PNG and SVG.
    """
    whole = boxes[0][3]
    drawn = [box for box in boxes if box[3] >= whole / 500]
    figure = Figure(figsize=(14, 1 + 0.3 * (1 + max(depth for _, depth, _, _ in drawn))), layout="constrained")
    panel = figure.subplots()
    palette = mpl.colormaps["Pastel1"]
    for name, depth, left, width in drawn:
        # the same name has the same colour in every run
        colour = palette(zlib.crc32(name.encode()) % palette.N)
        panel.barh(depth, width, left=left, height=1.0, align="center", color=colour, edgecolor="white", linewidth=0.5)
        # about as many letters as fit
        letters = int(150 * width / whole)
        if letters >= 3:
            text = f"{name} {width:.3g} ms" if len(name) + 9 <= letters else name[:letters]
            panel.text(left + whole / 1000, depth, text, fontsize=7, va="center", clip_on=True)
    panel.invert_yaxis()
    panel.set_xlim(0, whole)
    panel.set_yticks([])
    panel.set_xlabel("ms", fontsize=8)
    panel.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=9)
    return save_figure(figure, stem)


def save_sweep(
    memory: Mapping[int, Mapping[str, float]],
    times: Mapping[str, Mapping[int, float]],
    limit: float,
    title: str,
    stem: Path,
) -> tuple[Path, Path]:
    """Two panels against the world size: memory of a rank, stacked by part, and lines of seconds.

    Args:
        memory: world size → part → bytes.
        times: line → world size → seconds.
        limit: bytes that a rank has.
        title: of the figure.
        stem: where, without suffix.

    Returns:
        Paths of PNG and SVG.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = [str(ranks) for ranks in memory]
    bottom = [0.0] * len(labels)
    for part in next(iter(memory.values()), {}):
        sizes = [parts[part] / 1e9 for parts in memory.values()]
        left.bar(labels, sizes, bottom=bottom, label=part.replace("_", " "))
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    left.axhline(limit / 1e9, color="black", linestyle="--", label="limit")
    # beyond a few times the limit only "too much" matters
    left.set_ylim(0, min(max([*bottom, limit / 1e9]), 3 * limit / 1e9) * 1.05)
    left.set_ylabel("GB a rank")
    for name, line in times.items():
        right.plot([str(ranks) for ranks in line], [seconds * 1e3 for seconds in line.values()], marker="o", label=name)
    right.set_ylim(bottom=0)
    right.set_ylabel("ms a step, at least")
    for panel in (left, right):
        panel.set_xlabel("ranks, as many sequences each")
        panel.legend(fontsize=7)
        panel.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=9)
    return save_figure(figure, stem)


def save_lengths(lengths: npt.NDArray[np.int64], cut: int, title: str, stem: Path) -> tuple[Path, Path]:
    """How many sequences have which length, and which share of all events lies within them.

    Args:
        lengths: [S] >= 1, events of every sequence.
        cut: length beyond which the model sees nothing; drawn as a line.
        title: of the figure.
        stem: where, without suffix.

    Returns:
        Paths of PNG and SVG.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    top = int(lengths.max())
    edges = np.unique(np.geomspace(1, top + 1, 50).astype(np.int64))
    left.hist(lengths, bins=edges, color="#4878a8")
    left.set_yscale("log")
    left.set_ylabel("sequences")
    ordered = np.sort(lengths)
    places = np.unique(np.searchsorted(ordered, edges, side="right").clip(1)) - 1
    right.plot(ordered[places], np.cumsum(ordered)[places] / ordered.sum(), color="#4878a8")
    right.set_ylim(0, 1)
    right.set_ylabel("share of events, up to this length")
    for panel in (left, right):
        panel.set_xscale("log")
        panel.axvline(cut, color="black", linestyle="--", linewidth=0.8)
        panel.set_xlabel("events of a sequence (dashed: max_length)")
        panel.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=9)
    return save_figure(figure, stem)
