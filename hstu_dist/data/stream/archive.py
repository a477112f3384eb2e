"""Windows on disk, in the run folder: what every rank trains from, and what an interrupted stream goes on from.

A window is a folder of NumPy files that appears by one rename, together with the state of the stream after it: the
histories, the events of windows that are still open, and which files were read. So a window is made once, whatever
happens, and training can repeat it exactly.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hstu_dist.data.stream.histories import UserEvents, WindowEvents
from hstu_dist.data.stream.popularity import Popularity
from hstu_dist.errors import UserError
from hstu_dist.files import sync

Ints = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]

_FACTS = "facts.json"
_STATE = "state"
_VISIBLE_SECONDS = 10.0
"""Network file systems may show a new folder late."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A closed window, ready to be trained on.

    Attributes:
        number: 0, 1, ...; windows without events have none.
        facts: start and end (seconds since 1970), events, late and other counts so far.
        events: its users' histories and new events; arrays lie in files that are mapped into memory.
        history: [U] int64, how many events of each user are history.
        popularity: events of each item in earlier windows.
    """

    number: int
    facts: dict[str, Any]
    events: UserEvents
    history: Ints
    popularity: Popularity


@dataclass(frozen=True)
class Archive:
    """The folder of a run's windows.

    Attributes:
        folder: created when it is first written to.
    """

    folder: Path

    def numbers(self) -> list[int]:
        """Numbers of the windows that are there, ascending."""
        if not self.folder.is_dir():
            return []
        found = (re.fullmatch(r"window-(\d{8,})", entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, number: int) -> Path:
        """Folder of a window."""
        return self.folder / f"window-{number:08d}"

    def commit(self, window: Window, state: tuple[dict[str, Any], Arrays]) -> None:
        """Writes a window and the state after it; both are there or neither.

        Raises:
            UserError: the disk refuses.
        """
        unfinished = self.path(window.number).with_suffix(".unfinished")
        arrays = {**window.events.arrays(), "history": window.history, **window.popularity.arrays()}
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            (unfinished / _STATE).mkdir(parents=True)
            _write(unfinished, window.facts, arrays)
            _write(unfinished / _STATE, *state)
            unfinished.rename(self.path(window.number))
            sync(self.folder)
        except OSError as error:
            raise UserError(
                f"{self.folder}: a window of the stream cannot be written ({error.strerror or error})",
                "free space or set output=FOLDER to another disk; the same command continues",
            ) from error
        # only the newest state is ever needed
        shutil.rmtree(self.path(window.number - 1) / _STATE, ignore_errors=True)

    def newest_state(self) -> tuple[int, dict[str, Any], Arrays] | None:
        """Number of the newest window and the state after it; None before the first window.

        Raises:
            UserError: it is damaged.
        """
        numbers = self.numbers()
        if not numbers:
            return None
        values, arrays = self._read(self.path(numbers[-1]) / _STATE, mapped=False)
        return numbers[-1], values, arrays

    def open(self, number: int) -> Window:
        """A window that was committed.

        Raises:
            UserError: it is not there or damaged.
        """
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not (self.path(number) / _FACTS).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        facts, arrays = self._read(self.path(number), mapped=True)
        history, popularity = arrays.pop("history"), Popularity.of(arrays)
        return Window(number=number, facts=facts, events=UserEvents(**arrays), history=history, popularity=popularity)

    def remove_before(self, number: int) -> None:
        """Removes older windows but the newest of all, whose state the stream goes on from."""
        for old in self.numbers()[:-1]:
            if old < number:
                shutil.rmtree(self.path(old), ignore_errors=True)

    def _read(self, folder: Path, mapped: bool) -> tuple[dict[str, Any], Arrays]:
        try:
            facts: dict[str, Any] = json.loads((folder / _FACTS).read_text())
            arrays = {}
            for name in facts.pop("arrays"):
                # an empty file cannot be mapped
                file = folder / f"{name}.npy"
                arrays[name] = np.load(file, mmap_mode="r" if mapped and file.stat().st_size > 4096 else None)
            return facts, arrays
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{folder}: a window of the stream is missing or damaged ({str(error)[:200]})",
                "set name=NAME for a new run; this one cannot go on without it",
            ) from error


def window_of(number: int, joined: WindowEvents, popularity: Popularity, facts: dict[str, Any]) -> Window:
    """What `Archive.commit` takes."""
    return Window(number=number, facts=facts, events=joined.events, history=joined.history, popularity=popularity)


def _write(folder: Path, facts: dict[str, Any], arrays: Arrays) -> None:
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
        sync(folder / f"{name}.npy")
    (folder / _FACTS).write_text(json.dumps({**facts, "arrays": sorted(arrays)}))
    sync(folder / _FACTS)
    sync(folder)
