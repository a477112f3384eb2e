"""A log of any size split by user into files that fit into memory one by one: every later step works file by file.

The files hold ranges of raw user ids, in order, so that the sequences of one file follow those of the file before.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hstu_dist.data.events import Events, EventTable
from hstu_dist.data.prefetch import prefetch

EVENT_COLUMNS = ("user_key", "item_key", "event_time", "action", "log_row")
"""Raw ids, time in the log's own resolution, action, and the row of the log, which orders events of equal time."""
_TABLES_AHEAD = 1
_OWN_BYTES = 400 << 20
"""What the process needs beside the engine: libraries, and a few row groups that are being read or written."""
_BYTES_OF_NUMBERS, _BYTES_OF_TEXT = 80, 200
"""That an engine's sort needs for an event whose user id is a number or text."""


@dataclass(frozen=True, kw_only=True)
class Staged:
    """What is known of the staged events.

    Attributes:
        num_events: rows of all files.
        num_files: ranges of users; the file of a range may have no rows.
        per_second: units of `event_time` that are a second.
        bounds: raw user ids at which the second and later files start.
        has_text: whether raw ids are text, of users and of items.
    """

    num_events: int
    num_files: int
    per_second: int
    bounds: tuple[int | str, ...]
    has_text: dict[str, bool]

    @property
    def raw_types(self) -> dict[str, pa.DataType]:
        """Arrow types of users and items."""
        return {side: pa.string() if text else pa.int64() for side, text in self.has_text.items()}

    def files(self, folder: Path) -> list[Path]:
        """Of all ranges, in order."""
        return [folder / f"{index:05d}.parquet" for index in range(self.num_files)]


def engine_memory(memory: int) -> int:
    """Bytes that an engine may use of those that the whole preparation may."""
    return max(memory - _OWN_BYTES, memory // 4)


def stage(events: Events, folder: Path, memory: int) -> Staged:
    """Write all events into files of ranges of users, each of which can be sorted in memory.

    Args:
        events: checked while they are read.
        folder: an empty one.
        memory: bytes that the whole preparation may use; ranges of about as many events are cut by a sample.
    """
    sample = events.sample_users()
    event_bytes = _BYTES_OF_TEXT if _is_text(sample) else _BYTES_OF_NUMBERS
    bounds = _bounds(sample, -(-events.num_events * event_bytes // engine_memory(memory)))
    tables = prefetch(events.batches(), _TABLES_AHEAD)
    first = next(tables)
    staged = Staged(
        num_events=events.num_events,
        num_files=len(bounds) + 1,
        per_second=first.per_second,
        bounds=tuple(bounds.to_pylist()),
        has_text={"users": _is_text(first.users), "items": _is_text(first.items)},
    )
    schema = _columns(first).schema
    with ExitStack() as stack:
        # written once and read once or twice: cheap compression, no dictionaries
        writers = [
            stack.enter_context(pq.ParquetWriter(file, schema, compression="snappy", use_dictionary=False))
            for file in staged.files(folder)
        ]
        for table in chain([first], tables):
            _write_split(_columns(table), bounds, writers)
    return staged


def range_of(users: pa.Array, bounds: Sequence[int | str] | pa.Array) -> npt.NDArray[np.int64]:
    """[E] int64, the range that each raw user id is in."""
    limits = pa.array(bounds, users.type)
    if pa.types.is_integer(users.type):
        found: npt.NDArray[np.int64] = np.searchsorted(limits.to_numpy(), users.to_numpy(), side="right")
        return found
    ranges = np.zeros(len(users), dtype=np.int64)
    for limit in limits:
        ranges += pc.greater_equal(users, limit).to_numpy(zero_copy_only=False)
    return ranges


def _bounds(sample: pa.Array, parts: int) -> pa.Array:
    """At most parts - 1 distinct user ids, ascending, that cut the sample into equal shares."""
    ordered = sample.take(pc.sort_indices(sample))
    places = np.arange(1, parts) * len(ordered) // parts
    return pc.unique(ordered.take(pa.array(places, pa.int64())))


def _is_text(ids: pa.Array) -> bool:
    return not pa.types.is_integer(ids.type)


def _columns(table: EventTable) -> pa.Table:
    rows = np.arange(table.first_row, table.first_row + table.num_events, dtype=np.int64)
    arrays = [table.users, table.items, pa.array(table.order_times), pa.array(table.actions), pa.array(rows)]
    fields = [pa.field(name, array.type, nullable=False) for name, array in zip(EVENT_COLUMNS, arrays, strict=True)]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _write_split(columns: pa.Table, bounds: pa.Array, writers: Sequence[pq.ParquetWriter]) -> None:
    if len(writers) == 1:
        writers[0].write_table(columns)
        return
    ranges = range_of(columns["user_key"].combine_chunks(), bounds)
    order = np.argsort(ranges.astype(np.uint16), kind="stable")
    ends = np.cumsum(np.bincount(ranges, minlength=len(writers)))
    ordered = columns.take(pa.array(order))
    for writer, start, end in zip(writers, [0, *ends[:-1]], ends, strict=True):
        if end > start:
            writer.write_table(ordered.slice(start, end - start))
