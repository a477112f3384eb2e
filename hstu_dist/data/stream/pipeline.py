"""Files in, windows out: everything that a stream remembers between two files, saved and restored as a whole."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict
from typing import Any

import numpy as np

from hstu_dist.data.stream.archive import Archive, Arrays, Window, window_of
from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.data.stream.histories import Histories, UserEvents
from hstu_dist.data.stream.popularity import Popularity
from hstu_dist.data.stream.quarantine import CHANGED, Quarantine
from hstu_dist.data.stream.reading import Events, Reader, is_event_file
from hstu_dist.data.stream.source import SourceFile
from hstu_dist.data.stream.windows import ClosedWindow, Windower
from hstu_dist.errors import UserError

_log = logging.getLogger(__name__)


class Pipeline:
    """The state of a stream. What it gives depends on the order of the files alone."""

    def __init__(self, config: StreamConfig, archive: Archive, quarantine: Quarantine) -> None:
        """Goes on after the newest window of `archive`, or begins."""
        self.config = config
        self.archive = archive
        self.quarantine = quarantine
        self.windower = Windower(config)
        self.reader = Reader(config)
        self.histories = Histories(config.max_length, int(config.history_mib * 2**20))
        self.popularity = Popularity.before_all(config.num_items, numbered=config.item_ids != "raw")
        self.next_window = 0
        # of 64-bit hashes, 16 bytes a file and 8 a content, however long the names are
        self._files: dict[int, int] = {}
        self._contents: set[int] = set()
        self._restore()
        # the last ones came after the state was saved; looked at again, at another time, they might pass
        self._files |= {_hash(file.path.encode()): _fingerprint(file) for file in quarantine.unused}

    def is_new(self, file: SourceFile) -> bool:
        """Whether a file was not read yet; one that changed since it was read is set aside and counts as read."""
        known = self._files.get(_hash(file.path.encode()))
        if known is not None and known != _fingerprint(file):
            self._files[_hash(file.path.encode())] = _fingerprint(file)
            self.quarantine.add(file, CHANGED)
        return known is None

    def set_aside(self, file: SourceFile, reason: str) -> None:
        """Lists a new file as one that cannot be used, and counts it as read."""
        self._files[_hash(file.path.encode())] = _fingerprint(file)
        self.quarantine.add(file, reason)

    def take(self, file: SourceFile, content: bytes, now: float) -> None:
        """Reads a new file; one that cannot be used is set aside."""
        try:
            if not is_event_file(file.path):
                raise UserError("is no .parquet, .csv or .tsv file")
            key = _hash(content)
            if content and key in self._contents:
                raise UserError("has the content of a file that was read before")
            events = self.reader.read(file.path, content, now)
        except UserError as error:
            self.set_aside(file, error.problem)
            return
        self._files[_hash(file.path.encode())] = _fingerprint(file)
        self._contents.add(key)
        late, watermark = self.windower.counts.late, self.windower.watermark
        self.windower.add(events)
        if self.windower.counts.late > late:
            _log.warning(
                "stream: %s has %d events older than the watermark %s, %s",
                file.path,
                self.windower.counts.late - late,
                moment(watermark),
                "dropped" if self.config.late == "drop" else "added to the open window",
            )

    def advance(self, at_end: bool = False) -> Window | None:
        """Makes the next closed window and commits it; None if no window is closed.

        Args:
            at_end: no file will come any more.
        """
        closed = self.windower.close(all_of_them=at_end)
        if closed is None:
            return None
        window = self._join(closed)
        self.next_window += 1
        self.archive.commit(window, self._state())
        _log.info(
            "stream: window %d, %s to %s: %d events of %d users; %d users in %d MiB of histories",
            window.number,
            moment(closed.start),
            moment(closed.end),
            len(closed.events),
            len(window.history),
            len(self.histories.kept.users),
            self.histories.kept.num_bytes >> 20,
        )
        return window

    def _join(self, closed: ClosedWindow) -> Window:
        joined = self.histories.advance(closed.events)
        popularity = self.popularity
        self.popularity = popularity.plus(closed.events.items, self.config.num_items)
        facts = {
            "start": closed.start,
            "end": closed.end,
            "events": len(closed.events),
            "evicted_users": self.histories.evicted,
            **asdict(self.windower.counts),
        }
        return window_of(self.next_window, joined, popularity, facts)

    def _state(self) -> tuple[dict[str, Any], Arrays]:
        pending = {window: Events.join(parts) for window, parts in self.windower.pending.items()}
        every = Events.join(list(pending.values()))
        values = {
            "windower": self.windower.state(),
            "id_types": self.reader.id_types,
            "evicted": self.histories.evicted,
            "pending": {str(window): len(events) for window, events in pending.items()},
        }
        arrays: Arrays = {f"kept_{name}": array for name, array in self.histories.kept.arrays().items()}
        arrays |= {f"pending_{name}": getattr(every, name) for name in ("users", "items", "seconds", "actions")}
        arrays |= self.popularity.arrays()
        arrays["files"] = np.array([*self._files.keys(), *self._files.values()], dtype=np.int64).reshape(2, -1)
        arrays["contents"] = np.fromiter(self._contents, dtype=np.int64, count=len(self._contents))
        return values, arrays

    def _restore(self) -> None:
        found = self.archive.newest_state()
        if found is None:
            return
        number, values, arrays = found
        self.next_window = number + 1
        every = Events(*(arrays[f"pending_{name}"] for name in ("users", "items", "seconds", "actions")))
        sizes = values["pending"]
        ends = np.cumsum(list(sizes.values()), dtype=np.int64)
        pending = {
            int(window): [every.at(np.arange(end - size, end))]
            for (window, size), end in zip(sizes.items(), ends.tolist(), strict=True)
        }
        self.windower.restore(values["windower"], pending)
        self.reader.id_types = values["id_types"]
        kept = UserEvents(**{name[5:]: array for name, array in arrays.items() if name.startswith("kept_")})
        self.histories = Histories(self.config.max_length, self.histories.max_bytes, kept)
        self.histories.evicted = values["evicted"]
        self.popularity = Popularity.of(arrays)
        self._files = dict(zip(*arrays["files"].tolist(), strict=True))
        self._contents = set(arrays["contents"].tolist())


def moment(seconds: int | None) -> str:
    """A time for a log line."""
    return "none" if seconds is None else str(np.datetime64(seconds, "s")).replace("T", " ")


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _fingerprint(file: SourceFile) -> int:
    return _hash(f"{file.size} {file.mtime_ns}".encode())
