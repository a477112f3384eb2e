"""Anyone's event log, CSV or Parquet, as one checked columnar table; nothing is silently changed."""

from __future__ import annotations

import bisect
import glob
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from hstu_dist.data.columns import Column, actions_of, ids_of, times_of
from hstu_dist.data.config import EventsConfig
from hstu_dist.data.schema import file_hash
from hstu_dist.errors import UserError

CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
PARQUET_SUFFIXES = (".parquet",)
# a missing value in a CSV file; a quoted one is taken as text
NULL_TEXTS = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None")
# the year 2286; milliseconds of any date after April 1970 are beyond it
LATEST_PLAUSIBLE_SECOND = 10**10

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the rows of a table came from, for messages."""

    files: tuple[str, ...]
    starts: tuple[int, ...]

    def locate(self, row: int) -> str:
        """The file and the row within it, counted from 1 without a header."""
        index = bisect.bisect_right(self.starts, row) - 1
        return f"{self.files[index]} row {row - self.starts[index] + 1}"


@dataclass(frozen=True, kw_only=True)
class EventTable:
    """E events in their original order, every value checked.

    Attributes:
        users: [E] Arrow int64 or large_string, raw ids.
        items: [E] Arrow int64 or large_string, raw ids.
        order_times: [E] int64 or float64 in the source's own unit, the full resolution that orders events.
        seconds: [E] int64 >= 0, what is stored.
        actions: [E] int32 >= 0.
        origin: which row of which file each event is.
    """

    users: pa.Array
    items: pa.Array
    order_times: npt.NDArray[Any]
    seconds: npt.NDArray[np.int64]
    actions: npt.NDArray[np.int32]
    origin: Origin


class EventLog:
    """The files that an `EventsConfig` names.

    Raises:
        UserError: no input is named, or it names no file of a known format.
    """

    def __init__(self, config: EventsConfig) -> None:
        self.config = config
        if config.input is None:
            raise UserError("data.input: missing", "pass data.input=FILE (a CSV or Parquet file, a folder or a glob)")
        self.files = _find_files(config.input)

    def fingerprint(self) -> dict[str, str]:
        """Hash of every file by its name, in reading order."""
        base = os.path.commonpath([file.parent for file in self.files])
        try:
            return {os.path.relpath(file, base): file_hash(file) for file in self.files}
        except OSError as error:
            raise UserError(f"data.input: cannot be read ({error})", "check the file and its permissions") from error

    def read(self) -> EventTable:
        """Read and check every event.

        Raises:
            UserError: names the file, row, column and value that cannot be used.
        """
        config = self.config
        names = [config.user_column, config.item_column, config.timestamp_column]
        names += [config.action_column] if config.action_column is not None else []
        tables = [_read_file(file, names) for file in self.files]
        _check_same_types(self.files, tables)
        starts = np.cumsum([0, *(table.num_rows for table in tables)])
        origin = Origin(files=tuple(str(file) for file in self.files), starts=tuple(starts[:-1].tolist()))
        if starts[-1] == 0:
            raise UserError(f"{config.input}: has no events", "check data.input")
        table = pa.concat_tables(tables)
        is_csv = not _is_parquet(self.files[0])
        columns = {
            name: Column(name=name, values=table[name], locate=origin.locate, is_untyped=is_csv) for name in names
        }
        order_times, seconds = times_of(columns[config.timestamp_column], config.timestamp_unit)
        if seconds.max() > LATEST_PLAUSIBLE_SECOND:
            latest = f"{seconds.max():,} s since 1970"
            _log.warning("%s: latest time is %s; is data.timestamp_unit right?", config.timestamp_column, latest)
        return EventTable(
            users=ids_of(columns[config.user_column]),
            items=ids_of(columns[config.item_column]),
            order_times=order_times,
            seconds=seconds,
            actions=(
                np.zeros(len(seconds), dtype=np.int32)
                if config.action_column is None
                else actions_of(columns[config.action_column])
            ),
            origin=origin,
        )


def _find_files(pattern: str) -> list[Path]:
    root = Path(pattern)
    if root.is_file():
        found = [root]
    elif root.is_dir():
        found = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith((".", "_")) and _known(p))
    else:
        found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
    if not found:
        kind = "folder without CSV or Parquet files" if root.is_dir() else "no such file"
        raise UserError(f"data.input: got {pattern}: {kind}", "pass data.input=FILE (a CSV or Parquet file, ...)")
    for file in found:
        if not _known(file):
            raise UserError(
                f"data.input: got {file}, expected one of {', '.join(CSV_SUFFIXES + PARQUET_SUFFIXES)}",
                "convert or rename the file",
            )
    return found


def _is_parquet(file: Path) -> bool:
    return file.name.lower().endswith(PARQUET_SUFFIXES)


def _known(file: Path) -> bool:
    return file.name.lower().endswith(CSV_SUFFIXES + PARQUET_SUFFIXES)


def _read_file(file: Path, names: list[str]) -> pa.Table:
    """The named columns of one file; of a CSV file as text."""
    try:
        if file.stat().st_size == 0:
            raise UserError(f"{file}: is empty", "check data.input")
        if _is_parquet(file):
            with pq.ParquetFile(file) as parquet:
                _check_columns(file, parquet.schema_arrow.names, names)
                return parquet.read(columns=names).select(names)
        return _read_csv(file, names)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{file}: cannot be read ({str(error)[:300]})", "check that the file is complete and of its format"
        ) from error


def _read_csv(file: Path, names: list[str]) -> pa.Table:
    parse = pa_csv.ParseOptions(delimiter="\t" if ".tsv" in file.name.lower() else ",")
    with pa_csv.open_csv(file, parse_options=parse) as reader:
        _check_columns(file, reader.schema.names, names)
    # as text: a type guessed from the first rows could round ids or fail on a later row
    convert = pa_csv.ConvertOptions(
        include_columns=names,
        column_types={name: pa.string() for name in names},
        null_values=list(NULL_TEXTS),
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    return pa_csv.read_csv(file, parse_options=parse, convert_options=convert)


def _check_columns(file: Path, existing: list[str], wanted: list[str]) -> None:
    for name in wanted:
        if existing.count(name) != 1:
            how = "is missing" if name not in existing else "is there more than once"
            raise UserError(
                f"{file}: column '{name}' {how}, the file has {', '.join(existing)}",
                "set data.user_column, data.item_column, data.timestamp_column and data.action_column",
            )


def _check_same_types(files: list[Path], tables: list[pa.Table]) -> None:
    for file, table in zip(files[1:], tables[1:], strict=True):
        if _is_parquet(file) != _is_parquet(files[0]):
            raise UserError(f"{file}: got another format than {files[0]}", "pass files of one format")
        for field, first in zip(table.schema, tables[0].schema, strict=True):
            if field.type != first.type:
                raise UserError(
                    f"{file}: column '{field.name}' is {field.type}, expected {first.type} as in {files[0]}",
                    "give all files of an input the same format and types",
                )
