"""Plots of result files: headless, PNG for reading and SVG for print, the same bytes for the same figures."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.results import Results
from hstu_dist.files import write_atomically


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
