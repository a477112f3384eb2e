"""All events end to end in one plain file, and where each sequence starts in another: a copy of the Parquet files.

They lie in a folder of the data set, native-endian. Training reads the histories of a batch, one read a sequence, so
that memory does not grow with the data; scans of a whole column go through a mapping. An index says which sequence
files they were made from: copied or changed files are told apart by their hashes.
"""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hstu_dist.data.schema import Manifest, file_hash
from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically

Ints = npt.NDArray[np.int64]
Records = npt.NDArray[Any]

FLAT_FOLDER = "columns"
# side by side, because a history that is read at random should lie on one page of the disk, not on three
EVENT = np.dtype([("item_ids", np.int64), ("timestamps", np.int64), ("actions", np.int32)], align=True)
OFFSET = np.dtype(np.int64)
EVENTS_FILE, OFFSETS_FILE, _INDEX = "events.bin", "offsets.bin", "index.json"


class FlatWriter:
    """Writes runs of sequences at their places, in any order."""

    def __init__(self, folder: Path, num_sequences: int, num_events: int) -> None:
        """Makes files of full size in an existing folder; what an earlier writer wrote stays."""
        self.folder = folder
        for name, size in _sizes(num_sequences, num_events).items():
            with (folder / name).open("ab") as file:
                file.truncate(size)
        self._offsets, self._events = ((folder / name).open("r+b") for name in (OFFSETS_FILE, EVENTS_FILE))

    def write(self, sequence: int, event: int, lengths: Ints, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        """Put consecutive sequences in their place.

        Args:
            sequence: number of the first one.
            event: number of its first event.
            lengths: [S] events of each.
            columns: [E] item_ids, timestamps and actions.
        """
        # zeros, so that what lies between the fields is the same every time
        records = np.zeros(int(lengths.sum()), dtype=EVENT)
        for name, values in columns.items():
            records[name] = values
        ends = event + np.cumsum(lengths, dtype=OFFSET)
        self._offsets.seek((sequence + 1) * OFFSET.itemsize)
        self._offsets.write(ends.data)
        self._events.seek(event * EVENT.itemsize)
        self._events.write(records.data)

    def sync(self) -> None:
        """Put everything that was written on disk."""
        for file in (self._offsets, self._events):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Finish the files."""
        self.sync()
        for file in (self._offsets, self._events):
            file.close()


def write_index(folder: Path, hashes: Mapping[str, str]) -> None:
    """Say that the columns in `folder`/columns hold what the sequence files beside them do.

    Args:
        folder: of the data set.
        hashes: of the sequence files by name.
    """
    index = {name: [value, *_stat(folder / name)] for name, value in hashes.items()}
    write_atomically(folder / FLAT_FOLDER / _INDEX, json.dumps(index).encode())


class FlatColumns:
    """Columns of a data set on disk."""

    def __init__(self, folder: Path) -> None:
        """`folder` is that of the columns."""
        self._path = folder / EVENTS_FILE
        self._handle = os.open(self._path, os.O_RDONLY)
        # with the last reference, as the mappings are
        weakref.finalize(self, os.close, self._handle)
        self._maps = [_mapped(folder / name) for name in (OFFSETS_FILE, EVENTS_FILE)]
        self.offsets: Ints = np.frombuffer(self._maps[0], dtype=OFFSET)
        self.events: Records = np.frombuffer(self._maps[1], dtype=EVENT)

    def read(self, firsts: Ints, lengths: Ints) -> Records:
        """Runs of events end to end, [sum of lengths].

        Args:
            firsts: [B] number of the first event of each run.
            lengths: [B] events of each.

        Raises:
            UserError: the file has become shorter.
        """
        size = EVENT.itemsize
        # a read copies what is wanted; a mapping would keep the 64 KiB around every history resident
        places = zip((firsts * size).tolist(), (lengths * size).tolist(), strict=True)
        content = b"".join([os.pread(self._handle, length, first) for first, length in places])
        records: Records = np.frombuffer(content, dtype=EVENT)
        if len(records) != lengths.sum():
            raise UserError(f"{self._path}: has become shorter while it was used", "prepare the data set again")
        return records

    def forget_pages(self) -> None:
        """Give back the pages that were touched through the arrays, which stay valid."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


def open_columns(folder: Path, manifest: Manifest) -> FlatColumns | None:
    """The columns of a data set; None if any is missing, or they do not belong to its sequence files.

    Args:
        folder: of the data set.
        manifest: of the data set.
    """
    columns = folder / FLAT_FOLDER
    if not _is_current(folder, manifest.sequence_files):
        return None
    for name, size in _sizes(manifest.num_users, manifest.num_events).items():
        if not (columns / name).exists() or (columns / name).stat().st_size != size:
            return None
    return FlatColumns(columns)


def _sizes(num_sequences: int, num_events: int) -> dict[str, int]:
    """Bytes of every file."""
    return {OFFSETS_FILE: (num_sequences + 1) * OFFSET.itemsize, EVENTS_FILE: num_events * EVENT.itemsize}


def _mapped(file: Path) -> mmap.mmap:
    with file.open("rb") as handle:
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def _is_current(folder: Path, hashes: Mapping[str, str]) -> bool:
    try:
        index = json.loads((folder / FLAT_FOLDER / _INDEX).read_bytes())
        if {name: entry[0] for name, entry in index.items()} != dict(hashes):
            return False
        # a copied data set has other times, and only then is worth reading once
        return all(
            entry[1:] == list(_stat(folder / name)) or entry[0] == file_hash(folder / name)
            for name, entry in index.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def _stat(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns
