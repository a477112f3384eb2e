"""Files that cannot be used: one line of the log and one of quarantine.jsonl each; training goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hstu_dist.data.stream.source import SourceFile

CHANGED = "changed after it was read; the events of the first reading stay, no others come"

_log = logging.getLogger(__name__)


@dataclass
class Quarantine:
    """The list of a run.

    Attributes:
        path: of the list; a line has path, size, mtime_ns and reason of a file.
    """

    path: Path
    _listed: dict[SourceFile, str] = field(init=False)

    def __post_init__(self) -> None:
        self._listed = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                    self._listed[SourceFile(entry["path"], entry["size"], entry["mtime_ns"])] = entry["reason"]
                except (ValueError, KeyError, TypeError):
                    # a killed process can leave half a line at the end
                    continue

    @property
    def unused(self) -> Iterator[SourceFile]:
        """Files of which nothing was read, also by interrupted sessions, in order."""
        return (file for file, reason in self._listed.items() if reason != CHANGED)

    def add(self, file: SourceFile, reason: str) -> None:
        """Lists a file, unless an interrupted session of the run has done so."""
        if file in self._listed:
            return
        self._listed[file] = reason
        _log.warning("stream: %s is set aside: %s", file.path, reason)
        entry = {"path": file.path, "size": file.size, "mtime_ns": file.mtime_ns, "reason": reason}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as out:
            out.write(json.dumps(entry) + "\n")
