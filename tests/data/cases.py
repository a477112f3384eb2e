"""Small data sets and event logs that the tests of this folder share."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from hstu_dist.data.config import EventsConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.events import EventLog, EventTable
from hstu_dist.data.schema import FORMAT_VERSION, Manifest


def dataset_of(lengths: Sequence[int], num_items: int = 50) -> SequenceDataset:
    """Random events; action = position of the event in the whole data set, so that every event is told apart."""
    rng = np.random.default_rng(7)
    total = sum(lengths)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="test",
        created_by="test",
        num_users=len(lengths),
        num_items=num_items,
        num_events=total,
        mean_length=total / len(lengths),
        max_length=max(lengths),
        recipe={},
        sources={},
        files={},
    )
    return SequenceDataset(
        manifest=manifest,
        offsets=offsets,
        item_ids=rng.integers(0, num_items, total),
        timestamps=10**9 + np.arange(total),
        actions=np.arange(total, dtype=np.int32),
    )


def write_log(file: Path, columns: dict[str, Any]) -> Path:
    """Write columns as CSV or Parquet, by the file's name."""
    table = pa.table(columns)
    if file.suffix == ".parquet":
        pq.write_table(table, file)
    else:
        pa_csv.write_csv(table, file)
    return file


def read_log(config: EventsConfig) -> EventTable:
    """All events of a log as one table."""
    with tempfile.TemporaryDirectory() as scratch:
        log = EventLog(config).open(Path(scratch))
        tables = list(log.batches())
    assert sum(table.num_events for table in tables) == log.num_events
    assert [table.first_row for table in tables] == [0, *np.cumsum([table.num_events for table in tables])[:-1]]
    arrays = {name: pa.concat_arrays([getattr(table, name) for table in tables]) for name in ("users", "items")}
    columns = {name: np.concatenate([getattr(table, name) for table in tables]) for name in ("order_times", "actions")}
    return EventTable(**arrays, **columns, per_second=tables[0].per_second, origin=log.origin)


def log_config(file: Path, path: Path | str = "", **settings: Any) -> EventsConfig:
    """Configuration of a log with columns user, item, time."""
    return EventsConfig(
        input=str(file), path=str(path), user_column="user", item_column="item", timestamp_column="time", **settings
    )
