"""The columns of all sequences end to end in plain files that are mapped, not read: a copy of the Parquet files.

They lie in a folder of the data set, native-endian, each column in `<name>.bin`. The system reads the pages that are
touched and drops them when memory is short, so that a data set may be larger than memory. An index says which sequence
files they were made from: copied or changed files are told apart by their hashes.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hstu_dist.data.schema import file_hash
from hstu_dist.files import sync, write_atomically

Array = npt.NDArray[Any]

FLAT_FOLDER = "columns"
OFFSETS = "offsets"
DTYPES: Mapping[str, type] = {OFFSETS: np.int64, "item_ids": np.int64, "timestamps": np.int64, "actions": np.int32}
_INDEX = "index.json"


class FlatWriter:
    """Writes pieces of the columns at their places, in any order."""

    def __init__(self, folder: Path, num_sequences: int, num_events: int) -> None:
        """Makes files of full size in an existing folder; pieces that an earlier writer wrote stay."""
        sizes = {name: num_sequences + 1 if name == OFFSETS else num_events for name in DTYPES}
        self.folder = folder
        for name, size in sizes.items():
            with _file(folder, name).open("ab") as file:
                file.truncate(size * np.dtype(DTYPES[name]).itemsize)
        self._files = {name: _file(folder, name).open("r+b") for name in DTYPES}

    def write(self, sequence: int, event: int, lengths: Array, columns: Mapping[str, Array]) -> None:
        """Put consecutive sequences in their place.

        Args:
            sequence: number of the first one.
            event: number of its first event.
            lengths: [S] events of each.
            columns: [E] item_ids, timestamps and actions.
        """
        ends = event + np.cumsum(lengths, dtype=np.int64)
        pieces = {OFFSETS: (sequence + 1, ends), **{name: (event, values) for name, values in columns.items()}}
        for name, (start, values) in pieces.items():
            file = self._files[name]
            file.seek(start * file_itemsize(name))
            file.write(np.ascontiguousarray(values, dtype=DTYPES[name]).data)

    def close(self) -> None:
        """Put everything on disk."""
        for name, file in self._files.items():
            file.close()
            sync(_file(self.folder, name))


def file_itemsize(name: str) -> int:
    """Bytes of a value of a column."""
    return np.dtype(DTYPES[name]).itemsize


def write_index(folder: Path, hashes: Mapping[str, str]) -> None:
    """Say that the columns in `folder`/columns hold what the sequence files beside them do.

    Args:
        folder: of the data set.
        hashes: of the sequence files by name.
    """
    index = {name: [value, *_stat(folder / name)] for name, value in hashes.items()}
    write_atomically(folder / FLAT_FOLDER / _INDEX, json.dumps(index).encode())


@dataclass(frozen=True)
class FlatColumns:
    """Mapped columns.

    Attributes:
        arrays: offsets, item_ids, timestamps and actions; read-only.
        maps: their mappings.
    """

    arrays: Mapping[str, Array]
    maps: tuple[mmap.mmap, ...]

    def forget_pages(self) -> None:
        """Give back the pages that were touched; what is touched again comes from the system's cache or the disk."""
        for mapped in self.maps:
            mapped.madvise(mmap.MADV_DONTNEED)


def map_columns(folder: Path, hashes: Mapping[str, str], num_events: int) -> FlatColumns | None:
    """The columns of a data set; None if there are none, or they do not belong to its sequence files.

    Args:
        folder: of the data set.
        hashes: of the sequence files by name, as in the manifest.
        num_events: as in the manifest.
    """
    if not _is_current(folder, hashes):
        return None
    arrays: dict[str, Array] = {}
    maps = []
    for name, dtype in DTYPES.items():
        file = _file(folder / FLAT_FOLDER, name)
        with file.open("rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        arrays[name] = np.frombuffer(mapped, dtype=dtype)
        maps.append(mapped)
    lengths = {len(arrays[name]) for name in DTYPES if name != OFFSETS}
    return FlatColumns(arrays, tuple(maps)) if lengths == {num_events} else None


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


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _stat(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns
