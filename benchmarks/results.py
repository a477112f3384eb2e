"""Result files: one schema for every benchmark and experiment, written atomically, checked when read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically
from hstu_dist.validation import STRICT

RESULTS = Path(__file__).parent / "results"
"""Where committed result files and plots lie."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Row:
    """One measured figure: the median (or mean) of n samples, and their quartiles."""

    case: str
    contender: str
    metric: str
    value: Finite
    unit: str
    n: Annotated[int, Field(ge=1)]
    q25: Finite
    q75: Finite

    def __post_init__(self) -> None:
        if self.q25 > self.q75:
            raise ValueError(f"q25, q75: got {self.q25} and {self.q75}, expected q25 <= q75")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Ratio:
    """Contender a over contender b, always written so that more is better.

    Attributes:
        case: the case both were measured in, interleaved.
        metric: what was divided; a rate for speeds, so that 2 means that a is twice as fast. For memory a names
            the limit and b the contender.
        a: numerator.
        b: denominator.
        value: the ratio.
        target: what the project holds itself to, or None where a ratio is only reported.
    """

    case: str
    metric: str
    a: str
    b: str
    value: Finite
    target: Finite | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without a target."""
        return None if self.target is None else self.value >= self.target


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Results:
    """Everything one run measured, and what it was measured on.

    Attributes:
        name: stem of the file.
        command: what to type to measure it again.
        date: ISO 8601, UTC.
        commit: the commit measured, with `+changes` if tracked files differed from it.
        device: the chip.
        threads: CPU threads torch used.
        versions: of Python and of the packages that matter.
        rows: measured figures.
        ratios: comparisons, with their targets.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+(/[a-z0-9_]+)*$")]
    command: str
    date: str
    commit: str
    device: str
    threads: Annotated[int, Field(ge=1)]
    versions: dict[str, str]
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...] = ()

    def value(self, case: str, contender: str, metric: str) -> float:
        """The figure of one row.

        Raises:
            KeyError: there is no such row.
        """
        for row in self.rows:
            if (row.case, row.contender, row.metric) == (case, contender, metric):
                return row.value
        raise KeyError(f"{self.name}: no row {case!r}, {contender!r}, {metric!r}")


def write(results: Results, folder: Path = RESULTS) -> Path:
    """Writes `<folder>/<name>.json`; a reader sees the old file or the new one, never a part.

    Returns:
        The path written.
    """
    path = folder / f"{results.name}.json"
    text = json.dumps(asdict(results), indent=1, allow_nan=False) + "\n"
    write_atomically(path, text.encode())
    return path


def load(name: str, folder: Path = RESULTS) -> Results:
    """Reads and checks a result file.

    Raises:
        UserError: the file is missing or does not fit the schema.
    """
    path = folder / f"{name}.json"
    try:
        return TypeAdapter(Results).validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"result file {path}: not found", "measure it first: python -m benchmarks --help lists how"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "whole"
        raise UserError(
            f"result file {path}: {field}: {first['msg']}", "measure it again: python -m benchmarks"
        ) from error


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
        lines.append(_line(ratio.case, ratio.metric, names, f"{ratio.value:.2f}", target, verdict[ratio.met]))
    return "\n".join(lines) + "\n"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _heading(metric: str, unit: str) -> str:
    return metric if unit in ("", "1") else f"{metric} ({unit})"


def _cell(row: Row) -> str:
    if row.n == 1:
        return _short(row.value)
    return f"{_short(row.value)} ({_short(row.q25)} to {_short(row.q75)})"


def _short(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
