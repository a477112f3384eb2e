"""Markdown tables of a result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hstu_dist.report.results import Results, Row


def rows_table(results: Results, metrics: tuple[str, ...] | None = None) -> str:
    """Markdown table: a line per case and contender, a column per metric, `median (q25 to q75)` in the cells."""
    metrics = metrics or tuple(dict.fromkeys(row.metric for row in results.rows))
    cells = {(row.case, row.contender, row.metric): row for row in results.rows}
    units = {row.metric: row.unit for row in results.rows}
    lines = [_line("case", "contender", *(_heading(metric, units.get(metric, "")) for metric in metrics))]
    lines.append(_line("---", "---", *["---:"] * len(metrics)))
    for case, contender in dict.fromkeys((row.case, row.contender) for row in results.rows):
        found = [cells.get((case, contender, metric)) for metric in metrics]
        if any(found):
            lines.append(_line(case, contender, *("" if row is None else _cell(row) for row in found)))
    return "\n".join(lines) + "\n"


def ratios_table(results: Results) -> str:
    """Markdown table of the ratios; a missed target stays in it and says so."""
    lines = [_line("case", "metric", "ratio", "value", "target", ""), _line("---", "---", "---", "---:", "---:", "---")]
    verdict = {True: "met", False: "**missed**", None: ""}
    for ratio in results.ratios:
        target = "" if ratio.target is None else f"{ratio.target:g}"
        names = f"{ratio.a} / {ratio.b}"
        lines.append(_line(ratio.case, ratio.metric, names, _ratio(ratio.value), target, verdict[ratio.met]))
    return "\n".join(lines) + "\n"


def digest_table(entries: Sequence[tuple[str, Mapping[str, float], Results]]) -> str:
    """Markdown table with a line per result file: what is worth quoting, how many targets it met, the worst miss.

    Args:
        entries: (title, headline → value of a ratio, results).
    """
    lines = [
        _line("measured", "of note", "targets met", "farthest missed", "on"),
        _line("---", "---", "---:", "---", "---"),
    ]
    for title, headlines, results in entries:
        held = [ratio for ratio in results.ratios if ratio.target is not None]
        missed = sorted((r for r in held if not r.met), key=lambda r: r.value / (r.target or 1))
        of_note = "; ".join(f"{text} {_ratio(value)}" for text, value in headlines.items())
        met = f"{len(held) - len(missed)} of {len(held)}" if held else ""
        worst = [f"{r.metric}, {r.a} / {r.b}: {_ratio(r.value)} of {r.target:g} ({r.case})" for r in missed[:1]]
        others = [f"and {len(missed) - 1} more"] if len(missed) > 1 else []
        short = "; ".join([*worst, *others])
        lines.append(_line(title, of_note, met, short, f"{results.device}, {results.date[:10]}"))
    return "\n".join(lines) + "\n"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _heading(metric: str, unit: str) -> str:
    return metric if unit in ("", "1") else f"{metric} ({unit})"


def _cell(row: Row) -> str:
    if row.n == 1:
        return _short(row.value)
    return f"{_short(row.value)} ({_short(row.q25)} to {_short(row.q75)})"


def _ratio(value: float) -> str:
    """Hit rates differ in the third decimal."""
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def _short(value: float) -> str:
    """Three significant digits, four below 1, without an exponent for large figures."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.4g}" if abs(value) < 1 else f"{value:.3g}"
