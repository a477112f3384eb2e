"""A prepared data set appears whole or not at all: built beside its place, synced, then renamed."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_dist.data.flat_columns import FLAT_FOLDER, FlatWriter
from hstu_dist.data.schema import (
    ITEMS_FILE,
    SEQUENCE_SCHEMA,
    SEQUENCES_FILE,
    USERS_FILE,
    is_part_of_data_set,
    vocabulary_schema,
)
from hstu_dist.errors import UserError
from hstu_dist.files import is_disk_full, sync

# one row group is in memory at once; its lists must stay below 2^31 events
EVENTS_PER_ROW_GROUP = 1_000_000
IDS_PER_ROW_GROUP = 1 << 20

Ints = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """U sequences of E events in all, in memory, laid end to end; user u owns events offsets[u] to offsets[u+1].

    Attributes:
        users: [U] Arrow int64 or large_string, the raw id of every dense one, ascending.
        items: [I] likewise.
        offsets: [U+1] int64.
        item_ids: [E] int64 in [0, I).
        timestamps: [E] int64 seconds, ascending within a user.
        actions: [E] int32.
    """

    users: pa.Array
    items: pa.Array
    offsets: Ints
    item_ids: Ints
    timestamps: Ints
    actions: npt.NDArray[np.int32]


@contextmanager
def exclusive(target: Path, *, replaces: bool = True) -> Iterator[None]:
    """Hold the right to write `target`; waits for another process that has it, and cleans up after a killed one.

    Args:
        target: folder of a data set.
        replaces: whether what is there is going to be replaced, not only added to.

    Raises:
        UserError: `target` holds something that is no data set, or the folder above it cannot be written.
    """
    with os_errors_of(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(target)
    try:
        with os_errors_of(target):
            _clean_up(target)
            if replaces:
                _check_replaceable(target)
        yield
    finally:
        # while it is held: who waits for it finds that the file has gone, and makes another
        with suppress(OSError):
            _beside(target, "lock").unlink()
        os.close(handle)


def _locked(target: Path) -> int:
    """An open lock file beside `target`, held by this process alone."""
    path = _beside(target, "lock")
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("%s: waiting for another process that prepares it", target)
            fcntl.flock(handle, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `target` when the block ends without an error.

    The caller holds `exclusive(target)`. A process killed at any moment leaves the old data set or the new one,
    never a mixture; killed between the two renames it leaves the old one aside, and the next `exclusive` puts it back.

    Raises:
        UserError: the disk refuses to write.
    """
    building, previous = _beside(target, "building"), _beside(target, "previous")
    try:
        with os_errors_of(target):
            building.mkdir()
            yield building
            for file in (*building.rglob("*"), building):
                sync(file)
            if target.exists():
                target.rename(previous)
            building.rename(target)
            sync(target.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)


class SequenceWriter:
    """Writes a run of consecutive sequences as row groups of a Parquet file, and to their places in flat columns."""

    def __init__(self, file: Path, flat: FlatWriter, sequence: int, event: int) -> None:
        """`sequence` and `event` number the first ones."""
        self._parquet = _parquet_writer(file, SEQUENCE_SCHEMA)
        self._flat = flat
        self._sequence, self._event = sequence, event

    def write(self, lengths: Ints, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        """One row group.

        Args:
            lengths: [S] events of the next sequences.
            columns: [E] item_ids, timestamps and actions of them all.
        """
        self._flat.write(self._sequence, self._event, lengths, columns)
        offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())
        arrays = [pa.array(np.arange(self._sequence, self._sequence + len(lengths), dtype=np.int64))]
        for name in SEQUENCE_SCHEMA.names[1:]:
            arrays.append(
                pa.ListArray.from_arrays(offsets, pa.array(columns[name]), type=SEQUENCE_SCHEMA.field(name).type)
            )
        self._parquet.write_table(pa.Table.from_arrays(arrays, schema=SEQUENCE_SCHEMA), row_group_size=len(lengths))
        self._sequence += len(lengths)
        self._event += int(offsets[-1].as_py())

    def close(self) -> None:
        """Finish the Parquet file."""
        self._parquet.close()


class VocabularyWriter:
    """Writes raw ids, which come in ascending order, with their dense ids 0, 1, ... and numbers of events."""

    def __init__(self, file: Path, raw_type: pa.DataType) -> None:
        raw_type = pa.string() if pa.types.is_large_string(raw_type) else raw_type
        self._schema = vocabulary_schema(raw_type)
        self._parquet = _parquet_writer(file, self._schema)
        self._waiting = self._schema.empty_table()
        self.size = 0

    def write(self, raw: pa.Array, counts: pa.Array) -> None:
        """The next ids, any number of them: row groups do not depend on how they come."""
        ids = pa.array(np.arange(self.size, self.size + len(raw), dtype=np.int64))
        arrays = [ids, raw.cast(self._schema.field("raw").type), counts]
        self._waiting = pa.concat_tables([self._waiting, pa.Table.from_arrays(arrays, schema=self._schema)])
        self.size += len(raw)
        while len(self._waiting) >= IDS_PER_ROW_GROUP:
            self._write(self._waiting.slice(0, IDS_PER_ROW_GROUP))
            self._waiting = self._waiting.slice(IDS_PER_ROW_GROUP)

    def close(self) -> None:
        """Finish the file."""
        if len(self._waiting):
            self._write(self._waiting)
        self._parquet.close()

    def _write(self, table: pa.Table) -> None:
        # pages are cut where chunks end
        self._parquet.write_table(table.combine_chunks(), row_group_size=IDS_PER_ROW_GROUP)


def row_groups(lengths: Ints) -> Iterator[Ints]:
    """Runs of consecutive sequences, of about EVENTS_PER_ROW_GROUP events or of a single longer sequence."""
    ends = np.cumsum(lengths)
    first, before = 0, 0
    while first < len(lengths):
        last = max(int(np.searchsorted(ends, before + EVENTS_PER_ROW_GROUP, side="right")), first + 1)
        yield lengths[first:last]
        first, before = last, int(ends[last - 1])


def write_sequences(folder: Path, sequences: Sequences) -> None:
    """Write sequences that are in memory: vocabularies, Parquet and flat columns."""
    lengths = np.diff(sequences.offsets)
    write_pieces(folder, (sequences.users, sequences.items), lengths, _pieces(sequences, lengths))


Piece = tuple[Ints, Mapping[str, npt.NDArray[Any]]]
"""[S] lengths of consecutive sequences, and the columns [E] of their events."""


def write_pieces(folder: Path, vocabularies: tuple[pa.Array, pa.Array], lengths: Ints, pieces: Iterable[Piece]) -> None:
    """Write sequences that come in pieces: vocabularies, Parquet and flat columns.

    Args:
        folder: of the data set.
        vocabularies: raw ids of users and of items, as in `Sequences`.
        lengths: [U] of all sequences.
        pieces: of all sequences, a row group each.
    """
    users, items = vocabularies
    counts = np.zeros(len(items), dtype=np.int64)
    (folder / FLAT_FOLDER).mkdir()
    with (
        closing(FlatWriter(folder / FLAT_FOLDER, len(lengths), int(lengths.sum()))) as flat,
        closing(SequenceWriter(folder / SEQUENCES_FILE, flat, 0, 0)) as writer,
    ):
        for group, columns in pieces:
            writer.write(group, columns)
            counts += np.bincount(columns["item_ids"], minlength=len(items))
    for name, raw, events in ((USERS_FILE, users, lengths), (ITEMS_FILE, items, counts)):
        with closing(VocabularyWriter(folder / name, raw.type)) as vocabulary:
            vocabulary.write(raw, pa.array(events.astype(np.int64)))


def _pieces(sequences: Sequences, lengths: Ints) -> Iterator[Piece]:
    event = 0
    for group in row_groups(lengths):
        end = event + int(group.sum())
        yield group, {name: getattr(sequences, name)[event:end] for name in SEQUENCE_SCHEMA.names[1:]}
        event = end


def _parquet_writer(file: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # ids and times hardly repeat within a page, so dictionaries only cost; checksums find a damaged disk
    return pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False, write_page_checksum=True)


def link(source: Path, place: Path) -> None:
    """Let a file, or a folder and its files, also be at another place; a copy where the file system has no links."""
    if source.is_dir():
        place.mkdir()
        for file in source.iterdir():
            link(file, place / file.name)
        return
    try:
        os.link(source, place)
    except OSError as error:
        if is_disk_full(error):
            raise
        shutil.copy2(source, place)


@contextmanager
def os_errors_of(target: Path) -> Iterator[None]:
    """Errors of the system while `target` is written, as UserErrors."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error})", "free space or pass data.path=FOLDER"
        ) from error


def _beside(target: Path, what: str) -> Path:
    return target.parent / f".{target.name}.{what}"


def _check_replaceable(target: Path) -> None:
    """Only an empty folder or a data set may be replaced: a mistyped path must not cost anyone their files."""
    if not target.exists():
        return
    names = (entry.name for entry in target.iterdir()) if target.is_dir() else ["file"]
    foreign = sorted(name for name in names if not is_part_of_data_set(name))
    if foreign:
        raise UserError(f"{target}: holds {foreign[0]}, which is no part of a data set", "pass data.path=FOLDER")


def _clean_up(target: Path) -> None:
    """Remove what a killed process left; put back the old data set if it died between the two renames."""
    previous = _beside(target, "previous")
    if previous.exists() and not target.exists():
        previous.rename(target)
    for leftover in (previous, _beside(target, "building")):
        if leftover.exists():
            _log.info("%s: removing what an interrupted run left", leftover)
            shutil.rmtree(leftover)
