"""SequenceDataset: a prepared data set as flat arrays on disk; it may be larger than memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hstu_dist.data.flat_columns import FLAT_FOLDER, FlatColumns, FlatWriter, open_columns, write_index
from hstu_dist.data.schema import SEQUENCE_SCHEMA, Manifest, load_manifest
from hstu_dist.data.stochastic_length import spans
from hstu_dist.data.workspace import Workspace
from hstu_dist.data.writer import exclusive, os_errors_of
from hstu_dist.errors import UserError

Ints = npt.NDArray[np.int64]

_PREPARE = "run `python -m hstu_dist prepare` again"


@dataclass(frozen=True)
class Columns:
    """E events: item_ids and timestamps [E] int64, actions [E] int32."""

    item_ids: Ints
    timestamps: Ints
    actions: npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class SequenceDataset:
    """S sequences of E events in all; sequence s owns events offsets[s] to offsets[s+1].

    The arrays are read-only, and only what is touched of them is in memory.

    Attributes:
        manifest: what the data set is.
        offsets: [S+1] int64.
        item_ids: [E] int64 in [0, num_items).
        timestamps: [E] int64 seconds >= 0, ascending within a sequence.
        actions: [E] int32 >= 0.
        flat: the files that the arrays are mapped from; None: they are in memory.
    """

    manifest: Manifest
    offsets: Ints
    item_ids: Ints
    timestamps: Ints
    actions: npt.NDArray[np.int32]
    flat: FlatColumns | None = None

    @classmethod
    def open(cls, path: str | Path) -> SequenceDataset:
        """Map a prepared data set.

        Columns that are missing, or do not belong to the Parquet files beside them, are first made from those, whose
        every value is checked on the way; one process makes them, others wait.

        Raises:
            UserError: there is none at `path`, or it is damaged; names file and row.
        """
        folder = Path(path).resolve()
        manifest = load_manifest(Path(path))
        flat = open_columns(folder, manifest)
        if flat is None:
            with exclusive(folder, replaces=False):
                flat = open_columns(folder, manifest)
                flat = flat or _make_columns(folder, manifest)
        events = flat.events
        return cls(
            manifest=manifest,
            offsets=flat.offsets,
            item_ids=events["item_ids"],
            timestamps=events["timestamps"],
            actions=events["actions"],
            flat=flat,
        )

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        """Item ids are 0 to num_items - 1."""
        return self.manifest.num_items

    @property
    def lengths(self) -> Ints:
        """[S] int64, events of every sequence."""
        return np.diff(self.offsets)

    def read(self, firsts: Ints, lengths: Ints) -> Columns:
        """Runs of events end to end, without keeping anything of the data set in memory.

        Args:
            firsts: [B] number of the first event of each run.
            lengths: [B] events of each.
        """
        if self.flat is not None:
            events = self.flat.read(firsts, lengths)
            return Columns(events["item_ids"], events["timestamps"], events["actions"])
        places = spans(firsts, lengths)
        return Columns(self.item_ids[places], self.timestamps[places], self.actions[places])

    def forget_pages(self) -> None:
        """Give back the memory of what was touched of the arrays, which stay valid."""
        if self.flat is not None:
            self.flat.forget_pages()


def _make_columns(folder: Path, manifest: Manifest) -> FlatColumns:
    """Copy the Parquet files into columns, checked, row group by row group."""
    sequences = events = 0
    with os_errors_of(folder), Workspace(folder).scratch(FLAT_FOLDER) as building:
        with closing(FlatWriter(building, manifest.num_users, manifest.num_events)) as writer:
            for file, table in _row_groups(folder, manifest):
                lengths, columns = _checked(file, table, sequences, manifest.num_items)
                writer.write(sequences, events, lengths, columns)
                sequences, events = sequences + len(lengths), events + int(lengths.sum())
        for what, got, expected in (
            ("users", sequences, manifest.num_users),
            ("events", events, manifest.num_events),
        ):
            if got != expected:
                name = next(reversed(manifest.sequence_files))
                raise UserError(f"{folder / name}: got {got} {what}, expected {expected} as in the manifest", _PREPARE)
        shutil.rmtree(folder / FLAT_FOLDER, ignore_errors=True)
        building.rename(folder / FLAT_FOLDER)
        write_index(folder, manifest.sequence_files)
    flat = open_columns(folder, manifest)
    assert flat is not None
    return flat


def _row_groups(folder: Path, manifest: Manifest) -> Iterator[tuple[Path, pa.Table]]:
    for name in manifest.sequence_files:
        file = folder / name
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                if not parquet.schema_arrow.equals(SEQUENCE_SCHEMA):
                    got = str(parquet.schema_arrow).replace("\n", ", ")
                    raise UserError(f"{file}: got columns {got}, expected another schema", _PREPARE)
                for index in range(parquet.num_row_groups):
                    yield file, parquet.read_row_group(index)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file}: cannot be read ({str(error)[:300]})", _PREPARE) from error


def _checked(file: Path, table: pa.Table, first: int, num_items: int) -> tuple[Ints, dict[str, npt.NDArray[Any]]]:
    """Lengths and columns of consecutive sequences.

    Args:
        file: for messages.
        table: of SEQUENCE_SCHEMA.
        first: number of its first sequence.
        num_items: of the data set.
    """
    rows = _Rows(file, first)
    for name in SEQUENCE_SCHEMA.names:
        rows.reject(pc.is_null(table[name]).to_numpy(), f"{name} is null")
    user_ids = table["user_id"].to_numpy()
    rows.reject(user_ids != np.arange(first, first + len(user_ids)), "user_id is not the row number")
    lengths = _lengths(table["item_ids"])
    for name in ("timestamps", "actions"):
        rows.reject(_lengths(table[name]) != lengths, f"{name} has another length than item_ids")
    columns = {name: _flat(table[name]) for name in SEQUENCE_SCHEMA.names[1:]}
    items, times = columns["item_ids"], columns["timestamps"]
    starts = np.cumsum(lengths) - lengths
    # the first event of a sequence follows nothing
    descends = np.diff(times, prepend=times[:1]) < 0
    descends[starts[lengths > 0]] = False
    for bad, problem in (
        ((items < 0) | (items >= num_items), f"item id not in [0, {num_items})"),
        (times < 0, "timestamp is negative"),
        (columns["actions"] < 0, "action is negative"),
        (descends, "timestamp is smaller than the one before"),
    ):
        rows.reject_event(bad, starts, problem)
    return lengths, columns


@dataclass(frozen=True)
class _Rows:
    """Where checked rows are, for messages."""

    file: Path
    first: int

    def reject(self, bad: npt.NDArray[np.bool_], problem: str) -> None:
        """Raise for the first row that is true."""
        if bad.any():
            raise UserError(f"{self.file} row {self.first + int(bad.argmax())}: {problem}", _PREPARE)

    def reject_event(self, bad: npt.NDArray[np.bool_], starts: Ints, problem: str) -> None:
        """Raise for the first event that is true; `starts` has the first event of every row."""
        if bad.any():
            event = int(bad.argmax())
            row = int(np.searchsorted(starts, event, side="right")) - 1
            where = f"row {self.first + row} event {event - starts[row]}"
            raise UserError(f"{self.file} {where}: {problem}", _PREPARE)


def _lengths(lists: pa.ChunkedArray) -> Ints:
    lengths: Ints = pc.list_value_length(lists).to_numpy().astype(np.int64)
    return lengths


def _flat(lists: pa.ChunkedArray) -> npt.NDArray[Any]:
    # flatten, unlike values, respects the offset of a slice
    chunks = [chunk.flatten() for chunk in lists.chunks]
    if any(chunk.null_count for chunk in chunks):
        raise UserError("a list of the sequence file holds a null", _PREPARE)
    dtype = lists.type.value_type.to_pandas_dtype()
    return np.concatenate([np.empty(0, dtype=dtype), *(chunk.to_numpy() for chunk in chunks)])
