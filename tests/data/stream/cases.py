"""Made-up streams: files of events, and what a naive program makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_dist.data.log_files import is_hidden
from hstu_dist.data.stream.archive import Archive, Window
from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.data.stream.pipeline import Pipeline
from hstu_dist.data.stream.quarantine import Quarantine
from hstu_dist.data.stream.reading import Events
from hstu_dist.data.stream.source import Source

HOUR = 3600
START = 1_700_000_400 - 1_700_000_400 % HOUR
NUM_ITEMS = 50
MAX_LENGTH = 6


def config_of(path: Path | str, **settings: Any) -> StreamConfig:
    values = {
        "num_items": NUM_ITEMS,
        "item_ids": "dense",
        "max_length": MAX_LENGTH,
        "action_column": "action",
        "settle_seconds": 0.0,
        "poll_seconds": 0.02,
        "give_up_seconds": 5.0,
        **settings,
    }
    return StreamConfig(path=str(path), **values)


def events_of(hours: int, users: int = 12, a_user: int = 3, seed: int = 0) -> list[Events]:
    """One part an hour; action = number of the event in the whole stream, so that every event is told apart."""
    random = np.random.default_rng(seed)
    parts = []
    total = 0
    for hour in range(hours):
        count = users * a_user
        seconds = np.sort(START + hour * HOUR + random.integers(0, HOUR, count))
        numbers = np.arange(total, total + count, dtype=np.int32)
        total += count
        # a few users have most events, so that some have more than fit into one example
        who = (users * random.random(count) ** 2).astype(np.int64)
        parts.append(Events(who, random.integers(0, NUM_ITEMS, count), seconds, numbers))
    return parts


def table_of(events: Events) -> pa.Table:
    return pa.table(
        {"user_id": events.users, "item_id": events.items, "timestamp": events.seconds, "action": events.actions}
    )


def write_part(folder: Path, events: Events, name: str) -> Path:
    """A file that appears whole."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table_of(events), file.with_name(f"_{file.name}"))
    file.with_name(f"_{file.name}").rename(file)
    return file


def write_stream(folder: Path, parts: list[Events], end: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, events in enumerate(parts):
        write_part(folder, events, f"hour={number:04d}/part-0.parquet")
    if end:
        (folder / "_SUCCESS").touch()
    return folder


def pipeline_of(config: StreamConfig, run: Path) -> Pipeline:
    return Pipeline(config, Archive(run / "stream"), Quarantine(run / "quarantine.jsonl"))


def drain(pipeline: Pipeline, at_end: bool = True, now: float = 2e9) -> list[Window]:
    """Reads every new file there is, and makes every window."""
    source = Source(pipeline.config.path)
    made = []
    while window := pipeline.advance():
        made.append(window)
    for file in source.list():
        if is_hidden(file.path) or not pipeline.is_new(file):
            continue
        pipeline.take(file, source.read(file), now)
        while window := pipeline.advance():
            made.append(window)
    while at_end and (window := pipeline.advance(at_end=True)):
        made.append(window)
    return made


def same(a: Window, b: Window) -> bool:
    arrays = [(x.events.arrays() | {"history": x.history, "popularity": x.popularity.events}) for x in (a, b)]
    equal = all(np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])
    return equal and (a.number, a.facts) == (b.number, b.facts)
