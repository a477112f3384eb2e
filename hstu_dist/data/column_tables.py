"""Columns of the files of a log, CSV or Parquet: each file as a table of Parquet with the types of the log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from pyarrow import fs

from hstu_dist.data.log_files import LogFile
from hstu_dist.errors import UserError
from hstu_dist.files import is_disk_full

# a missing value in a CSV file; a quoted one is taken as text
_NULL_TEXTS = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None")
_ROWS_AT_ONCE = 1 << 20
_READ_AHEAD_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class ColumnTable:
    """The wanted columns of one file of a log, in Parquet.

    Attributes:
        file: of the log.
        filesystem: of the Parquet file, which is the log's own or a copy of its text.
        path: of that file.
        schema: of the wanted columns.
        num_rows: all of them.
    """

    file: LogFile
    filesystem: fs.FileSystem
    path: str
    schema: pa.Schema
    num_rows: int

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows, in order."""
        with _errors_of(self.file), _parquet(self.filesystem, self.path) as parquet:
            for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=self.schema.names):
                yield batch.select(self.schema.names)

    def some(self, name: str, row_groups: int) -> Iterator[pa.RecordBatch]:
        """A column of at most so many row groups, evenly spread."""
        with _errors_of(self.file), _parquet(self.filesystem, self.path) as parquet:
            count = parquet.num_row_groups
            chosen = sorted({index * count // row_groups for index in range(row_groups)}) if count else []
            yield from parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[name], row_groups=chosen)


def column_tables(files: Sequence[LogFile], names: list[str], scratch: Path) -> list[ColumnTable]:
    """The named columns of files of one format and the same types.

    Args:
        files: CSV or Parquet.
        names: of the columns.
        scratch: an empty folder; CSV files are copied into it as columns of text.

    Raises:
        UserError: names the file and column that cannot be used.
    """
    tables = [_column_table(file, names, scratch / f"{index}.parquet") for index, file in enumerate(files)]
    _check_same_types(tables)
    return tables


def _column_table(file: LogFile, names: list[str], copy: Path) -> ColumnTable:
    with _errors_of(file):
        if file.size == 0:
            raise UserError(f"{file.shown}: is empty", "check data.input")
        if not file.is_parquet:
            _copy_csv(file, names, copy)
        where = (file.filesystem, file.path) if file.is_parquet else (fs.LocalFileSystem(), str(copy))
        with _parquet(*where) as parquet:
            schema = parquet.schema_arrow
            _check_columns(file, schema.names, names)
            schema = pa.schema([schema.field(name) for name in names])
            return ColumnTable(
                file=file, filesystem=where[0], path=where[1], schema=schema, num_rows=parquet.metadata.num_rows
            )


@contextmanager
def _parquet(filesystem: fs.FileSystem, path: str) -> Iterator[pq.ParquetFile]:
    # buffered, so that a row group of any size does not have to fit into memory
    with (
        filesystem.open_input_file(path) as stream,
        pq.ParquetFile(stream, buffer_size=_READ_AHEAD_BYTES, pre_buffer=False) as parquet,
    ):
        yield parquet


def as_text(names: list[str]) -> pa_csv.ConvertOptions:
    """How columns of a CSV file are read: as text, because a type guessed from the first rows
    could round ids or fail on a later row.
    """
    return pa_csv.ConvertOptions(
        include_columns=names,
        column_types={name: pa.string() for name in names},
        null_values=list(_NULL_TEXTS),
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )


def _copy_csv(file: LogFile, names: list[str], copy: Path) -> None:
    """The named columns of a CSV file as a Parquet file of texts."""
    name = file.path.lower().rsplit("/", 1)[-1]
    parse = pa_csv.ParseOptions(delimiter="\t" if ".tsv" in name else ",")
    packed = "gzip" if name.endswith(".gz") else None
    with (
        file.filesystem.open_input_stream(file.path, packed) as stream,
        pa_csv.open_csv(stream, parse_options=parse) as reader,
    ):
        _check_columns(file, reader.schema.names, names)
    schema = pa.schema([(name, pa.string()) for name in names])
    read = pa_csv.ReadOptions(block_size=_READ_AHEAD_BYTES)
    with (
        file.filesystem.open_input_stream(file.path, packed) as stream,
        pa_csv.open_csv(stream, read_options=read, parse_options=parse, convert_options=as_text(names)) as reader,
        pq.ParquetWriter(copy, schema, compression="zstd") as writer,
    ):
        for batch in reader:
            writer.write_batch(batch)


@contextmanager
def _errors_of(file: LogFile) -> Iterator[None]:
    try:
        yield
    # names of columns are decoded by Python
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        if is_disk_full(error):
            raise
        raise UserError(
            f"{file.shown}: cannot be read ({str(error)[:300]})", "check that the file is complete and of its format"
        ) from error


def _check_columns(file: LogFile, existing: list[str], wanted: list[str]) -> None:
    for name in wanted:
        if existing.count(name) != 1:
            how = "is missing" if name not in existing else "is there more than once"
            raise UserError(
                f"{file.shown}: column '{name}' {how}, the file has {', '.join(existing)}",
                "set data.user_column, data.item_column, data.timestamp_column and data.action_column(s)",
            )


def _check_same_types(tables: Sequence[ColumnTable]) -> None:
    for table in tables[1:]:
        for field, first in zip(table.schema, tables[0].schema, strict=True):
            if field.type != first.type:
                raise UserError(
                    f"{table.file.shown}: column '{field.name}' is {field.type}, expected {first.type} as in "
                    f"{tables[0].file.shown}",
                    "give all files of an input the same format and types",
                )
