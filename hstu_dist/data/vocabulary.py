"""Vocabulary: which raw id (a number or text of the event log) each dense id stands for, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hstu_dist.data.schema import ITEMS_FILE, USERS_FILE, vocabulary_schema
from hstu_dist.errors import UserError

_REMEDY = "run `python -m hstu_dist prepare` again"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Dense ids 0 to len - 1 of the users or items of a data set.

    Attributes:
        raw: [V] Arrow int64 or string, ascending.
        counts: [V] int64, events of each.
    """

    raw: pa.Array
    counts: npt.NDArray[np.int64]

    @classmethod
    def items(cls, path: str | Path) -> Vocabulary:
        """Of the items of a prepared data set.

        Raises:
            UserError: the file is missing or damaged.
        """
        return cls._read(Path(path) / ITEMS_FILE)

    @classmethod
    def numbers(cls, size: int) -> Vocabulary:
        """Of values that are their own ids, 0 to size - 1; nobody has counted their events."""
        return cls(raw=pa.array(np.arange(size)), counts=np.zeros(size, dtype=np.int64))

    @classmethod
    def users(cls, path: str | Path) -> Vocabulary:
        """Of the users of a prepared data set.

        Raises:
            UserError: the file is missing or damaged.
        """
        return cls._read(Path(path) / USERS_FILE)

    @classmethod
    def raw_items(cls, path: str | Path) -> Iterator[pa.Array]:
        """The raw values of `items` in parts, without holding all of them.

        Raises:
            UserError: the file is missing or damaged.
        """
        return cls._raw(Path(path) / ITEMS_FILE)

    @classmethod
    def raw_users(cls, path: str | Path) -> Iterator[pa.Array]:
        """The raw values of `users` in parts, without holding all of them.

        Raises:
            UserError: the file is missing or damaged.
        """
        return cls._raw(Path(path) / USERS_FILE)

    @classmethod
    def _raw(cls, file: Path) -> Iterator[pa.Array]:
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                for batch in parquet.iter_batches(columns=["raw"]):
                    yield batch["raw"]
        except (OSError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{file}: cannot be read ({str(error)[:300]})", _REMEDY) from error

    @classmethod
    def _read(cls, file: Path) -> Vocabulary:
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                table = parquet.read().combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file}: cannot be read ({str(error)[:300]})", _REMEDY) from error
        if table.schema.names != ["id", "raw", "count"] or table.schema != vocabulary_schema(table["raw"].type):
            raise UserError(f"{file}: got columns {table.schema.names}, expected another schema", _REMEDY)
        if not np.array_equal(table["id"].to_numpy(), np.arange(len(table))):
            raise UserError(f"{file}: id is not the row number", _REMEDY)
        return cls(raw=pa.concat_arrays(table["raw"].chunks), counts=table["count"].to_numpy())

    def __len__(self) -> int:
        """V."""
        return len(self.raw)

    def encode(self, values: Sequence[int] | Sequence[str]) -> npt.NDArray[np.int64]:
        """Dense ids of raw values, -1 where one is not known; int64.

        Raises:
            ValueError: the values are not of the vocabulary's type.
        """
        try:
            wanted = pa.array(values, self.raw.type)
        except (pa.ArrowException, OverflowError) as error:
            raise ValueError(f"values: got {error}, expected {self.raw.type}") from error
        found = pc.index_in(wanted, self.raw)
        ids: npt.NDArray[np.int64] = pc.fill_null(found, -1).to_numpy().astype(np.int64)
        return ids

    def decode(self, ids: npt.NDArray[np.int64]) -> list[int] | list[str]:
        """Raw values of dense ids.

        Raises:
            ValueError: an id is not in [0, len).
        """
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            raise ValueError(f"ids: got {ids.min()} to {ids.max()}, expected 0 to {len(self) - 1}")
        values: list[int] | list[str] = self.raw.take(pa.array(ids, pa.int64())).to_pylist()
        return values
