"""SequenceDataset: a prepared data set in memory as flat arrays, every value checked when it is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hstu_dist.data.schema import SEQUENCE_SCHEMA, SEQUENCES_FILE, Manifest, load_manifest
from hstu_dist.errors import UserError

Ints = npt.NDArray[np.int64]

_PREPARE = "run `python -m hstu_dist prepare` again"


@dataclass(frozen=True, kw_only=True)
class SequenceDataset:
    """S sequences of E events in all; sequence s owns events offsets[s] to offsets[s+1].

    Attributes:
        manifest: what the data set is.
        offsets: [S+1] int64.
        item_ids: [E] int64 in [0, num_items).
        timestamps: [E] int64 seconds >= 0, ascending within a sequence.
        actions: [E] int32 >= 0.
    """

    manifest: Manifest
    offsets: Ints
    item_ids: Ints
    timestamps: Ints
    actions: npt.NDArray[np.int32]

    @classmethod
    def open(cls, path: str | Path) -> SequenceDataset:
        """Read and check a prepared data set.

        Raises:
            UserError: there is none at `path`, or it is damaged; names file and row.
        """
        folder = Path(path)
        manifest = load_manifest(folder)
        file = folder / SEQUENCES_FILE
        columns = _read_columns(file)
        dataset = cls(manifest=manifest, **columns)
        _check(dataset, file)
        return dataset

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


def _read_columns(file: Path) -> dict[str, Any]:
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            if not parquet.schema_arrow.equals(SEQUENCE_SCHEMA):
                got = str(parquet.schema_arrow).replace("\n", ", ")
                raise UserError(f"{file}: got columns {got}, expected another schema", _PREPARE)
            groups = [parquet.read_row_group(index) for index in range(parquet.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read ({str(error)[:300]})", _PREPARE) from error
    table = pa.concat_tables(groups) if groups else SEQUENCE_SCHEMA.empty_table()
    for name in SEQUENCE_SCHEMA.names:
        if table[name].null_count:
            raise UserError(f"{file} row {pc.index(pc.is_null(table[name]), True)}: {name} is null", _PREPARE)
    user_ids = table["user_id"].to_numpy()
    _reject(file, user_ids != np.arange(len(user_ids)), "user_id is not the row number")
    lengths = _lengths(table["item_ids"])
    for name in ("timestamps", "actions"):
        _reject(file, _lengths(table[name]) != lengths, f"{name} has another length than item_ids")
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return {"offsets": offsets, **{name: _flat(table[name]) for name in SEQUENCE_SCHEMA.names[1:]}}


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


def _check(dataset: SequenceDataset, file: Path) -> None:
    manifest = dataset.manifest
    for what, got, expected in (
        ("users", dataset.num_sequences, manifest.num_users),
        ("events", len(dataset.item_ids), manifest.num_events),
    ):
        if got != expected:
            raise UserError(f"{file}: got {got} {what}, expected {expected} as in the manifest", _PREPARE)
    items, times = dataset.item_ids, dataset.timestamps
    # the first event of a sequence follows nothing
    descends = np.diff(times, prepend=times[:1]) < 0
    descends[dataset.offsets[:-1][dataset.lengths > 0]] = False
    for bad, problem in (
        ((items < 0) | (items >= dataset.num_items), f"item id not in [0, {dataset.num_items})"),
        (times < 0, "timestamp is negative"),
        (dataset.actions < 0, "action is negative"),
        (descends, "timestamp is smaller than the one before"),
    ):
        event = int(bad.argmax()) if len(bad) else 0
        if len(bad) and bad[event]:
            row = int(np.searchsorted(dataset.offsets, event, side="right")) - 1
            raise UserError(f"{file} row {row} event {event - dataset.offsets[row]}: {problem}", _PREPARE)


def _reject(file: Path, bad: npt.NDArray[np.bool_], problem: str) -> None:
    if bad.any():
        raise UserError(f"{file} row {int(bad.argmax())}: {problem}", _PREPARE)
