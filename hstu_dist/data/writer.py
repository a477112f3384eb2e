"""A prepared data set appears whole or not at all: built beside its place, synced, then renamed."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_dist.data.schema import (
    DATA_FILES,
    ITEMS_FILE,
    MANIFEST_FILE,
    SEQUENCE_SCHEMA,
    SEQUENCES_FILE,
    USERS_FILE,
    vocabulary_schema,
)
from hstu_dist.data.sequences import Sequences
from hstu_dist.errors import UserError
from hstu_dist.files import sync

# one row group is read at once; its lists must stay below 2^31 events
EVENTS_PER_ROW_GROUP = 4_000_000

_log = logging.getLogger(__name__)


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the right to write `target`; waits for another process that has it, and cleans up after a killed one.

    Raises:
        UserError: `target` holds something that is no data set, or the folder above it cannot be written.
    """
    with _os_errors_of(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(_beside(target, "lock"), os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("%s: waiting for another process that prepares it", target)
            fcntl.flock(handle, fcntl.LOCK_EX)
        with _os_errors_of(target):
            _clean_up(target)
            _check_replaceable(target)
        yield
    finally:
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
        with _os_errors_of(target):
            building.mkdir()
            yield building
            sync(building)
            if target.exists():
                target.rename(previous)
            building.rename(target)
            sync(target.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)


def write_sequences(folder: Path, sequences: Sequences) -> None:
    """Write the three data files of a data set and sync them to disk."""
    users = np.diff(sequences.offsets)
    items = np.bincount(sequences.item_ids, minlength=len(sequences.items))
    _write_vocabulary(folder / USERS_FILE, sequences.users, users)
    _write_vocabulary(folder / ITEMS_FILE, sequences.items, items)
    with _synced(folder / SEQUENCES_FILE) as sink, _parquet_writer(sink, SEQUENCE_SCHEMA) as writer:
        offsets = sequences.offsets
        first = 0
        while first < len(users):
            last = int(np.searchsorted(offsets, offsets[first] + EVENTS_PER_ROW_GROUP, side="right")) - 1
            last = max(last, first + 1)
            writer.write_table(_sequence_table(sequences, first, last), row_group_size=last - first)
            first = last


def write_text(file: Path, text: str) -> None:
    """Write a file and sync it to disk."""
    with _synced(file) as sink:
        sink.write(text.encode())


def _sequence_table(sequences: Sequences, first: int, last: int) -> pa.Table:
    """Users first to last - 1 in the schema of the file."""
    start, end = int(sequences.offsets[first]), int(sequences.offsets[last])
    offsets = pa.array(sequences.offsets[first : last + 1] - start, pa.int32())
    columns = [pa.array(np.arange(first, last, dtype=np.int64))]
    for name in SEQUENCE_SCHEMA.names[1:]:
        values = pa.array(getattr(sequences, name)[start:end])
        columns.append(pa.ListArray.from_arrays(offsets, values, type=SEQUENCE_SCHEMA.field(name).type))
    return pa.Table.from_arrays(columns, schema=SEQUENCE_SCHEMA)


def _write_vocabulary(file: Path, raw: pa.Array, counts: np.ndarray) -> None:
    raw = raw.cast(pa.string()) if pa.types.is_large_string(raw.type) else raw
    schema = vocabulary_schema(raw.type)
    columns = [pa.array(np.arange(len(raw), dtype=np.int64)), raw, pa.array(counts.astype(np.int64))]
    with _synced(file) as sink, _parquet_writer(sink, schema) as writer:
        writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _parquet_writer(sink: pa.NativeFile, schema: pa.Schema) -> pq.ParquetWriter:
    # ids and times hardly repeat within a page, so dictionaries only cost; checksums find a damaged disk
    return pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=False, write_page_checksum=True)


@contextmanager
def _synced(file: Path) -> Iterator[pa.NativeFile]:
    with file.open("wb") as handle:
        sink = pa.PythonFile(handle, mode="w")
        yield sink
        handle.flush()
        os.fsync(handle.fileno())


@contextmanager
def _os_errors_of(target: Path) -> Iterator[None]:
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
    foreign = sorted({p.name for p in target.iterdir()} - {MANIFEST_FILE, *DATA_FILES}) if target.is_dir() else ["file"]
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
