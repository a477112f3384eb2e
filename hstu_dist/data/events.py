"""Anyone's event log, CSV or Parquet, as checked columnar tables of bounded size; nothing is silently changed."""

from __future__ import annotations

import bisect
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hstu_dist.actions import action_fields
from hstu_dist.data.column_tables import ColumnTable, column_tables
from hstu_dist.data.columns import (
    Column,
    Reading,
    actions_of,
    ids_of,
    is_text,
    packed_actions,
    reading_of,
    reject_times,
    times_of,
)
from hstu_dist.data.config import Duplicates, EventsConfig
from hstu_dist.data.log_files import find_files, fingerprints, is_hash
from hstu_dist.errors import UserError

# the year 2286; milliseconds of any date after April 1970 are beyond it
LATEST_PLAUSIBLE_SECOND = 10**10
_SAMPLED_ROW_GROUPS = 16
_SAMPLED_USERS = 1 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the rows of a log came from, for messages.

    Attributes:
        files: in reading order.
        starts: first row of every file.
    """

    files: tuple[str, ...]
    starts: tuple[int, ...]

    def locate(self, row: int) -> str:
        """The file and the row within it, counted from 1 without a header."""
        index = bisect.bisect_right(self.starts, row) - 1
        return f"{self.files[index]} row {row - self.starts[index] + 1}"


class Events(Protocol):
    """A checked log, read as often as need be.

    Attributes:
        num_events: of all batches.
        origin: of every row.
    """

    @property
    def num_events(self) -> int: ...  # noqa: D102

    @property
    def origin(self) -> Origin: ...  # noqa: D102

    def batches(self) -> Iterator[EventTable]:
        """All events, in order, in pieces."""

    def sample_users(self) -> pa.Array:
        """Raw user ids of some events, from all over the log."""


@dataclass(frozen=True, kw_only=True)
class EventTable:
    """E events in their original order, every value checked.

    Attributes:
        users: [E] Arrow int64 or large_string, raw ids.
        items: [E] Arrow int64 or large_string, raw ids.
        order_times: [E] int64 or float64 >= 0 in the source's own unit, the full resolution that orders events.
        per_second: units of time that are a second.
        actions: [E] int32 >= 0.
        origin: of the rows of the whole log.
        first_row: of this table within the log.
    """

    users: pa.Array
    items: pa.Array
    order_times: npt.NDArray[Any]
    per_second: int = 1
    actions: npt.NDArray[np.int32]
    origin: Origin
    first_row: int = 0

    @property
    def seconds(self) -> npt.NDArray[np.int64]:
        """[E] what is stored of the times."""
        return (self.order_times // self.per_second).astype(np.int64)

    @property
    def num_events(self) -> int:
        """E."""
        return len(self.actions)

    def batches(self) -> Iterator[EventTable]:
        """The table itself."""
        yield self

    def sample_users(self) -> pa.Array:
        """Every user or, of many events, those of some."""
        step = max(1, self.num_events // _SAMPLED_USERS)
        return self.users.take(pa.array(np.arange(0, self.num_events, step)))


class EventLog:
    """The files that an `EventsConfig` names.

    Raises:
        UserError: no input is named, or it names no file of a known format.
    """

    def __init__(self, config: EventsConfig) -> None:
        self.config = config
        if config.input is None:
            raise UserError("data.input: missing", "pass data.input=FILE (a CSV or Parquet file, a folder or a glob)")
        self.files = find_files(config.input)
        self._fingerprints: dict[str, str] = {}

    def fingerprint(self) -> dict[str, str]:
        """Hash of every file by its name, in reading order."""
        self._fingerprints = self._fingerprints or fingerprints(self.files)
        return self._fingerprints

    def open(self, scratch: Path) -> OpenLog:
        """Check everything that needs no values: columns, types, formats.

        Args:
            scratch: an empty folder; CSV files are copied into it as columns of text.

        Raises:
            UserError: names the file and column that cannot be used, or there are no events.
        """
        config = self.config
        names = [config.user_column, config.item_column, config.timestamp_column]
        names += [config.action_column] if config.action_column is not None else [*config.action_columns]
        tables = column_tables(self.files, names, scratch)
        log = OpenLog(config=config, tables=tables)
        if log.num_events == 0:
            raise UserError(f"{config.input}: has no events", "check data.input")
        self._check_copies(tables)
        log.settle_readings()
        return log

    def _check_copies(self, tables: Sequence[ColumnTable]) -> None:
        """All events of a file that is there twice would be repeats."""
        first: dict[str, ColumnTable] = {}
        for table, content in zip(tables, self.fingerprint().values(), strict=True):
            if is_hash(content) and table.num_rows and first.setdefault(content, table) is not table:
                problem = f"{table.file.shown}: has the same content as {first[content].file.shown}"
                if self.config.duplicates is Duplicates.ERROR:
                    raise UserError(problem, "remove one of them, or pass data.duplicates=drop or data.duplicates=keep")
                _log.warning("%s (data.duplicates=%s)", problem, self.config.duplicates.value)


class OpenLog:
    """A log whose columns and types are known to be sound; values are checked as they are read."""

    def __init__(self, *, config: EventsConfig, tables: Sequence[ColumnTable]) -> None:
        self.config = config
        self.tables = tables
        starts = np.cumsum([0, *(table.num_rows for table in tables)]).tolist()
        self.num_events = int(starts.pop())
        self.origin = Origin(files=tuple(table.file.shown for table in tables), starts=tuple(starts))
        self._readings: dict[str, Reading] = {}

    def settle_readings(self) -> None:
        """Read columns of text once, to know what all of their values stand for.

        Raises:
            UserError: times that are neither numbers nor dates.
        """
        first = self.tables[0]
        texts = {field.name for field in first.schema if is_text(field.type)}
        texts = {name for name in texts if not first.file.is_parquet or name == self.config.timestamp_column}
        for name in sorted(texts):
            pieces = (column.values for column in self._columns(name))
            self._readings[name] = reduce(and_, map(reading_of, pieces), Reading.ANYTHING)
            if name == self.config.timestamp_column and self._readings[name] is Reading.TEXT:
                self._reject_times(name)

    def batches(self) -> Iterator[EventTable]:
        """Every event, checked.

        Raises:
            UserError: names the file, row, column and value that cannot be used, or a file that changed meanwhile.
        """
        config, plausible = self.config, True
        for start, batch in self._batches():
            columns = {name: self._column(start, name, batch.column(name)) for name in batch.schema.names}
            times, per_second = times_of(columns[config.timestamp_column], config.timestamp_unit)
            latest = times.max(initial=0) // per_second
            if plausible and latest > LATEST_PLAUSIBLE_SECOND:
                shown = f"{int(latest):,} s since 1970"
                _log.warning("%s: a time is %s; is data.timestamp_unit right?", config.timestamp_column, shown)
                plausible = False
            yield EventTable(
                users=ids_of(columns[config.user_column]),
                items=ids_of(columns[config.item_column]),
                order_times=times,
                per_second=per_second,
                actions=self._actions(columns, len(times)),
                origin=self.origin,
                first_row=start,
            )
        for table in self.tables:
            table.file.check_unchanged()

    def sample_users(self) -> pa.Array:
        """Users of a few row groups of every file, or of some files if there are many."""
        filled = [table for table in self.tables if table.num_rows]
        tables = filled[:: -(-len(filled) // _SAMPLED_ROW_GROUPS)]
        groups = max(1, _SAMPLED_ROW_GROUPS // len(tables))
        name = self.config.user_column
        every = max(1, sum(table.num_rows for table in tables) // _SAMPLED_USERS)
        pieces = []
        try:
            for table in tables:
                for batch in table.some(name, groups):
                    rows = pa.array(np.arange(0, len(batch), every))
                    pieces.append(ids_of(self._column(0, name, batch.column(0).take(rows))))
        except UserError:
            # a sample does not know its place: reading in order finds the first value that is wrong
            deque(self.batches(), maxlen=0)
            raise
        # the row groups that were looked into may be empty
        return pa.concat_arrays(pieces) if pieces else next(e.users for e in self.batches() if len(e.users))

    def _actions(self, columns: Mapping[str, Column], count: int) -> npt.NDArray[np.int32]:
        config = self.config
        if config.action_column is not None:
            return actions_of(columns[config.action_column])
        if config.action_columns:
            return packed_actions([columns[n] for n in config.action_columns], action_fields(config.action_columns))
        return np.zeros(count, dtype=np.int32)

    def _batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        start = 0
        for table in self.tables:
            for batch in table.batches():
                yield start, batch
                start += len(batch)

    def _columns(self, name: str) -> Iterator[Column]:
        return (self._column(start, name, batch.column(name)) for start, batch in self._batches())

    def _column(self, start: int, name: str, values: pa.Array) -> Column:
        locate: Callable[[int], str] = lambda row: self.origin.locate(start + row)  # noqa: E731
        reading = self._readings.get(name, Reading.TEXT)
        return Column(name=name, values=pa.chunked_array([values]), locate=locate, reading=reading)

    def _reject_times(self, name: str) -> None:
        first = None
        for column in self._columns(name):
            first = column.values[0] if first is None and len(column.values) else first
            reject_times(column, first)
