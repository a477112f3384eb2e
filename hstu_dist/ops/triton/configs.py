"""Tile sizes: a table per architecture, kernel, head width and bias, and a loader for tables tuned on a device.

No tuning happens at start-up. The built-in table was chosen from compile reports (no spills, wide tensor-core
instructions, shared memory within the chip's limit), not from timings.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from hstu_dist.errors import UserError


class Kernel(StrEnum):
    """The kernels of the backend; `FAR` is the one without tiles, and has no entry in the tables."""

    FORWARD = "forward"
    QUERY = "query"
    KEY = "key"
    BIAS = "bias"
    FAR = "far"


class Architecture(StrEnum):
    """Chips with a table of their own; `INTERPRETER` is Triton's emulation on the CPU."""

    SM_80 = "sm_80"
    SM_90 = "sm_90"
    SM_100 = "sm_100"
    SM_SMALL = "sm_small"
    GFX942 = "gfx942"
    INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled.

    Attributes:
        queries: rows of a tile of queries.
        keys: rows of a tile of keys.
        warps: warps of a program.
        stages: depth of the software pipeline.
    """

    queries: int
    keys: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0 or (value & (value - 1) and name != "stages"):
                raise ValueError(f"Config.{name}: got {value}, expected a positive power of two")


class Key(NamedTuple):
    """Which kernel a config is for.

    Attributes:
        architecture: the chip.
        kernel: which kernel.
        width: widest head of 16-bit numbers that the config serves: a power of two, or one less for heads whose rows
            do not start at multiples of 16 bytes, which take more registers to load; 0 for float32 of any width,
            whose exact products use no tensor cores.
        biased: with a relative bias.
    """

    architecture: Architecture
    kernel: Kernel
    width: int
    biased: bool


Table = dict[Key, Config]

TABLE_PATH = Path(__file__).with_name("configs.json")


def read_table(path: Path) -> Table:
    """A table as `write_table` wrote it: architecture, kernel, width, then [queries, keys, warps, stages] twice.

    The first four numbers are for calls without a bias, the second for calls with one.

    Raises:
        UserError: the file is missing or does not have this form.
    """
    try:
        nested = json.loads(path.read_text())
        return {
            Key(Architecture(architecture), Kernel(kernel), int(width), biased): Config(*numbers)
            for architecture, kernels in nested.items()
            for kernel, widths in kernels.items()
            for width, pair in widths.items()
            for biased, numbers in zip((False, True), pair, strict=True)
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a table of kernel configs ({error})", "write it again with --tune") from error


def write_table(path: Path, table: Table) -> None:
    """Writes a table for `read_table`, one line for each width; every width needs an entry with and without bias."""
    nested: dict[str, dict[str, dict[str, list[list[int]]]]] = {}
    for key in sorted(table):
        widths = nested.setdefault(key.architecture, {}).setdefault(key.kernel, {})
        widths.setdefault(str(key.width), []).append(list(asdict(table[key]).values()))
    text = json.dumps(nested, indent=1)
    # the innermost lists on one line each
    text = re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    path.write_text(re.sub(r"\[\s+(\[.*?\]),\s+(\[.*?\])\s+\]", r"[\1, \2]", text) + "\n")


@functools.cache
def default_table() -> Table:
    """The table that comes with the package."""
    return read_table(TABLE_PATH)


def choose(key: Key, table: Table) -> Config:
    """The entry for the least width that is not below `key.width`, or exactly that for 0.

    Odd widths, of unaligned heads, take any entry; the others skip odd entries.

    Raises:
        UserError: the head is wider than any entry.
    """
    served = sorted(k.width for k in table if k._replace(width=key.width) == key and k.width % 2 <= key.width % 2)
    for width in served:
        if width == key.width or width > key.width > 0:
            return table[key._replace(width=width)]
    raise UserError(
        f"head width: got {key.width}, expected at most {max(served, default=0)} for the {key.kernel} kernel on "
        f"{key.architecture}",
        "use backend=blocked, or narrower heads",
    )
