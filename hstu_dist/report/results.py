"""Result files: one schema for every benchmark and experiment, written atomically, checked when read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically
from hstu_dist.validation import STRICT

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


def write(results: Results, folder: Path) -> Path:
    """Writes `<folder>/<name>.json`; a reader sees the old file or the new one, never a part.

    Returns:
        The path written.
    """
    path = folder / f"{results.name}.json"
    fields = [f" {json.dumps(name)}: {_json(value)}" for name, value in asdict(results).items()]
    write_atomically(path, ("{\n" + ",\n".join(fields) + "\n}\n").encode())
    return path


def _json(value: Any) -> str:
    """A list with one entry a line: short files, and differences that name what changed."""
    if not isinstance(value, tuple) or not value:
        return json.dumps(value, allow_nan=False)
    return "[\n" + ",\n".join(f"  {json.dumps(entry, allow_nan=False)}" for entry in value) + "\n ]"


def load(name: str, folder: Path) -> Results:
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
