"""One file of a stream as checked events; whatever is wrong with it is a reason to set the whole file aside."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from hstu_dist.data.column_tables import as_text
from hstu_dist.data.columns import Column, Reading, actions_of, ids_of, is_text, reading_of, times_of
from hstu_dist.data.log_files import CSV_SUFFIXES, PARQUET_SUFFIXES
from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.data.stream.keys import item_ids, user_keys
from hstu_dist.data.stream.source import first_line
from hstu_dist.errors import UserError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Events:
    """E events in the order they came.

    Attributes:
        users: [E] int64 keys.
        items: [E] int64 rows of the item table, or keys where the table has a vocabulary of its own.
        seconds: [E] int64 since 1970.
        actions: [E] int32.
    """

    users: Ints
    items: Ints
    seconds: Ints
    actions: npt.NDArray[np.int32]

    def __len__(self) -> int:
        """E."""
        return len(self.seconds)

    def at(self, rows: Ints | npt.NDArray[np.bool_]) -> Events:
        """Some of them."""
        return Events(self.users[rows], self.items[rows], self.seconds[rows], self.actions[rows])

    @classmethod
    def join(cls, parts: list[Events]) -> Events:
        """All events of several parts, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        nothing = np.empty(0, dtype=np.int64)
        parts = parts or [cls(nothing, nothing, nothing, nothing.astype(np.int32))]
        users, items, seconds = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("users", "items", "seconds")
        )
        return cls(users, items, seconds, np.concatenate([part.actions for part in parts]))


@dataclass
class Reader:
    """Turns files into events, all alike in their types.

    Attributes:
        config: of the stream.
        id_types: column → integers or text, as the first Parquet file had it; part of the stream's state. CSV has no
            types: in one file ids may all be integers, in the next one not.
    """

    config: StreamConfig
    id_types: dict[str, str] = field(default_factory=dict)

    def read(self, path: str, content: bytes, now: float) -> Events:
        """The events of a file, ordered by time at the full resolution of the file.

        Args:
            path: of the file; tells its format.
            content: all of it.
            now: seconds since 1970 by this machine's clock.

        Raises:
            UserError: the file cannot be used; says why, without naming it.
        """
        config = self.config
        table, is_csv = _parse(path, content, config.columns)
        columns = {name: self._column(name, table[name], is_csv) for name in config.columns}
        if table.num_rows == 0:
            return Events.join([])
        users, items = ids_of(columns[config.user_column]), ids_of(columns[config.item_column])
        order_times, per_second = times_of(columns[config.timestamp_column], config.timestamp_unit)
        seconds = (order_times // per_second).astype(np.int64)
        latest = int(seconds.argmax())
        if seconds[latest] > now + config.max_skew_seconds:
            columns[config.timestamp_column].reject(
                latest, f"a time at most {config.max_skew_seconds} s ahead of this machine's clock", ""
            )
        actions = np.zeros(len(seconds), dtype=np.int32)
        if config.action_column is not None:
            actions = actions_of(columns[config.action_column])
        rows = item_ids(items, config.num_items, config.item_ids)
        # last, when nothing else can be wrong: a file that is set aside must not decide types
        if not is_csv:
            self._check_types({config.user_column: users, config.item_column: items})
        events = Events(user_keys(users), rows, seconds, actions)
        if (np.diff(order_times) < 0).any():
            events = events.at(np.argsort(order_times, kind="stable"))
        return events

    def _column(self, name: str, values: pa.ChunkedArray, is_csv: bool) -> Column:
        config = self.config
        # ids of a CSV file stay the texts that they are, whatever the other rows look like; rows must be numbers
        is_id = name == config.user_column or (name == config.item_column and config.item_ids != "dense")
        untyped = is_text(values.type) and (name == config.timestamp_column or (is_csv and not is_id))
        reading = reading_of(values) if untyped else Reading.TEXT
        return Column(name=name, values=values, locate=lambda row: f"row {row + 1}", reading=reading)

    def _check_types(self, ids: dict[str, pa.Array]) -> None:
        found = {name: "integers" if pa.types.is_integer(values.type) else "text" for name, values in ids.items()}
        for name, kind in found.items():
            if self.id_types.get(name, kind) != kind:
                raise UserError(f"column '{name}' has {kind}, expected {self.id_types[name]} as in earlier files")
        self.id_types |= found


def is_event_file(path: str) -> bool:
    """Whether a name promises a format that can be read."""
    return path.lower().endswith((*CSV_SUFFIXES, *PARQUET_SUFFIXES))


def _parse(path: str, content: bytes, names: list[str]) -> tuple[pa.Table, bool]:
    """The named columns, and whether they are untyped text."""
    if not content:
        raise UserError("is empty")
    is_csv = not path.lower().endswith(PARQUET_SUFFIXES)
    try:
        return (_parse_csv(path, content, names) if is_csv else _parse_parquet(content, names)), is_csv
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"cannot be read ({first_line(error)})") from error


def _parse_parquet(content: bytes, names: list[str]) -> pa.Table:
    with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as parquet:
        _check_columns(parquet.schema_arrow.names, names)
        return parquet.read(columns=names).select(names)


def _parse_csv(path: str, content: bytes, names: list[str]) -> pa.Table:
    plain = gzip.decompress(content) if path.lower().endswith(".gz") else content
    parse = pa_csv.ParseOptions(delimiter="\t" if ".tsv" in path.lower().rsplit("/", 1)[-1] else ",")
    with pa_csv.open_csv(pa.BufferReader(plain), parse_options=parse) as reader:
        _check_columns(reader.schema.names, names)
    return pa_csv.read_csv(pa.BufferReader(plain), parse_options=parse, convert_options=as_text(names))


def _check_columns(existing: list[str], wanted: list[str]) -> None:
    for name in wanted:
        if existing.count(name) != 1:
            how = "is missing" if name not in existing else "is there more than once"
            raise UserError(f"column '{name}' {how}, the file has {', '.join(existing)[:200]}")
