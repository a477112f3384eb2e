"""Cells: the parts of a long measurement, stored as they come, so that an interrupted one goes on where it stopped.

A cell counts as long as what it was measured with is unchanged: code, device, threads, versions, settings. A whole
measurement removes its cells: the next run of the same command measures anew.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hstu_dist.files import write_atomically
from hstu_dist.report.results import Ratio, Row

log = logging.getLogger(__name__)


@dataclass
class Findings:
    """Rows and ratios of a part of a measurement.

    Attributes:
        rows: measured figures.
        ratios: comparisons.
        refused: contenders that computed something wrong, with the reason.
    """

    rows: list[Row] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Appends those of another part."""
        self.rows += other.rows
        self.ratios += other.ratios
        self.refused += other.refused


@dataclass(frozen=True)
class _Stored:
    stamp: dict[str, str]
    findings: Findings


_STORED = TypeAdapter(_Stored)


class Cells:
    """The finished cells of one measurement."""

    def __init__(self, folder: Path, stamp: Mapping[str, str]) -> None:
        """Cells lie in `folder`; those with another stamp are measured again."""
        self.folder = folder
        self.stamp = dict(stamp)

    def measure(self, name: str, measure: Callable[[], Findings]) -> Findings:
        """What the cell holds, measured now if it is not there yet."""
        path = self.folder / f"{name}.json"
        found = self._load(path)
        if found is not None:
            log.info("%s: already measured", name)
            return found
        log.info("%s", name)
        findings = measure()
        write_atomically(path, _STORED.dump_json(_Stored(self.stamp, findings)))
        return findings

    def clear(self) -> None:
        """Forgets them: the measurement is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _load(self, path: Path) -> Findings | None:
        try:
            stored = _STORED.validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        return stored.findings if stored.stamp == self.stamp else None
