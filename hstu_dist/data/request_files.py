"""Files of requests in Parquet: read in pieces, checked, and written again with answers as further columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_dist.errors import UserError
from hstu_dist.files import replacing

_COLUMNS = (
    "item_ids list<int64 or string>, timestamps list<int64>, candidates and time where they apply, and what the model "
    "reads of users and actions"
)


class RequestFile:
    """A Parquet file with one request a row.

    Columns: `item_ids` and `timestamps`, lists of equal lengths, oldest event first, times in seconds; `candidates`, a
    list; `time` (int64 seconds, when the request is made), optional; what else a model reads. Others are passed on.
    """

    def __init__(self, path: Path, needed: tuple[str, ...]) -> None:
        """Opens a file.

        Args:
            path: of the file.
            needed: columns that must be there.

        Raises:
            UserError: it cannot be read, or a column is missing.
        """
        self.path = path
        try:
            self._parquet = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read ({str(error)[:300]})", "give a Parquet file") from error
        self.schema: pa.Schema = self._parquet.schema_arrow
        for name in needed:
            if name not in self.schema.names:
                raise UserError(f"{path}: got columns {self.schema.names}, expected {name}", f"needed: {_COLUMNS}")

    @property
    def num_rows(self) -> int:
        """Requests."""
        return int(self._parquet.metadata.num_rows)

    def pieces(self, rows: int) -> Iterator[Piece]:
        """All requests, at most `rows` at once.

        Raises:
            UserError: a page of the file is damaged.
        """
        first = 0
        try:
            for batch in self._parquet.iter_batches(batch_size=rows):
                yield Piece(self.path, first, batch)
                first += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path}: cannot be read ({str(error)[:300]})", "write the file again") from error


class Piece:
    """Some consecutive requests of a file."""

    def __init__(self, path: Path, first_row: int, batch: pa.RecordBatch) -> None:
        self.path = path
        self.first_row = first_row
        self.batch = batch

    @property
    def count(self) -> int:
        """Requests."""
        return int(self.batch.num_rows)

    def has(self, name: str) -> bool:
        """Whether the file has a column."""
        return name in self.batch.schema.names

    def lists(self, name: str) -> tuple[npt.NDArray[np.int64], Any]:
        """Offsets [B+1] int64 and flat values of a list column: int64, or a list of strings.

        Raises:
            UserError: another type, or a null.
        """
        column = self.batch.column(name)
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise UserError(f"{self.path}: column {name}: got {column.type}, expected a list", f"needed: {_COLUMNS}")
        self._refuse_nulls(name, column)
        # flatten, unlike values, respects the offset of a slice
        flat = column.flatten()
        offsets = column.offsets.to_numpy().astype(np.int64)
        if flat.null_count:
            place = flat.is_null().to_pylist().index(True)
            row = int(np.searchsorted(offsets - offsets[0], place, side="right")) - 1
            raise UserError(f"{self.path} row {self.first_row + row}: {name} holds a null", "leave it out")
        return offsets - offsets[0], self._values(name, flat)

    def optional(self, name: str) -> list[Any]:
        """Values of a column, one a request, None for a null."""
        found: list[Any] = self.batch.column(name).to_pylist()
        return found

    def values(self, name: str) -> Any:
        """Values of a column, one a request: int64, or a list of strings.

        Raises:
            UserError: another type, or a null.
        """
        column = self.batch.column(name)
        self._refuse_nulls(name, column)
        return self._values(name, column)

    def _values(self, name: str, flat: Any) -> Any:
        if pa.types.is_string(flat.type) or pa.types.is_large_string(flat.type):
            return flat.to_pylist()
        if not pa.types.is_integer(flat.type):
            raise UserError(
                f"{self.path}: column {name}: got {flat.type}, expected integers or text", f"needed: {_COLUMNS}"
            )
        try:
            return flat.cast(pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowException as error:
            raise UserError(f"{self.path}: column {name}: {error}", "store it as int64") from error

    def _refuse_nulls(self, name: str, column: Any) -> None:
        if column.null_count:
            row = self.first_row + column.is_null().to_pylist().index(True)
            raise UserError(f"{self.path} row {row}: {name} is null", "an empty list stands for nothing")


class AnswerFile:
    """The requests and further columns, written piece by piece."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer = writer
        self._schema = schema

    def write(self, piece: Piece, answers: Mapping[str, tuple[npt.NDArray[np.int64], Any]]) -> None:
        """Adds a piece.

        Args:
            piece: of the file of requests.
            answers: for each further column, offsets [B+1] and flat values, of which NaN becomes null.
        """
        columns = list(piece.batch.columns)
        for name, (offsets, values) in answers.items():
            wanted = self._schema.field(name).type
            nan_is_null = pa.types.is_floating(wanted.value_type)
            flat = pa.array(values, wanted.value_type, from_pandas=nan_is_null)
            columns.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=wanted))
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))


@contextmanager
def answers(requests: RequestFile, output: Path, added: Mapping[str, str]) -> Iterator[AnswerFile]:
    """A file that appears whole when the block ends, and not at all if it fails.

    Args:
        requests: what is answered; its columns come first.
        output: the new file; an old one is replaced.
        added: further list columns, each with the name of its elements' Arrow type.

    Raises:
        UserError: the requests have such a column already, or the file cannot be written.
    """
    for name in added:
        if name in requests.schema.names:
            raise UserError(f"{requests.path}: has a column {name} already", "leave it out of the input")
    fields = [pa.field(name, pa.list_(pa.type_for_alias(kind))) for name, kind in added.items()]
    schema = pa.schema([*requests.schema, *fields])
    try:
        with (
            replacing(output) as file,
            pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer,
        ):
            yield AnswerFile(writer, schema)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})", "set output to a writable file") from error
