"""Staged events to per-user sequences: dense ids in order of the raw ones, times in order, ties as they came.

An engine counts, joins and sorts; what it gives is written as it comes. Nothing here is as large as the log: users and
items are counted over all files of staged events, then every file is sorted by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hstu_dist.data.config import Duplicates
from hstu_dist.data.engine import (
    SIDES,
    Engine,
    count_events,
    distinct_events,
    event_at,
    repeated_events,
    sorted_events,
)
from hstu_dist.data.events import Origin
from hstu_dist.data.flat_columns import FLAT_FOLDER, FlatWriter
from hstu_dist.data.schema import ITEMS_FILE, USERS_FILE, sequence_file
from hstu_dist.data.staging import Staged, range_of
from hstu_dist.data.workspace import Workspace
from hstu_dist.data.writer import SequenceWriter, VocabularyWriter, row_groups
from hstu_dist.errors import UserError

Ints = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """Which events are kept; see EventsConfig."""

    duplicates: Duplicates = Duplicates.KEEP
    min_user_events: int = 1
    min_item_events: int = 1

    @property
    def minimum(self) -> dict[str, int]:
        """Events of every user and item that is kept."""
        return {"users": self.min_user_events, "items": self.min_item_events}

    @property
    def drops_rare(self) -> bool:
        """Whether an event may be left out."""
        return max(self.minimum.values()) > 1


@dataclass(frozen=True, kw_only=True)
class Log:
    """Staged events of a log.

    Attributes:
        folder: of their files.
        staged: what they are.
        origin: of the rows of the log, for messages.
    """

    folder: Path
    staged: Staged
    origin: Origin

    @property
    def files(self) -> list[Path]:
        """One for every range of users."""
        return self.staged.files(self.folder)


def build_sequences(log: Log, cleaning: Cleaning, engine: Engine, work: Workspace) -> list[Path]:
    """Clean, number and sort the events.

    Args:
        log: what came in.
        cleaning: what is kept.
        engine: runs the queries.
        work: where finished steps are, and the results get.

    Returns:
        The files and the folder of flat columns that are the data set.

    Raises:
        UserError: duplicate events where they are not allowed, or no event is left.
    """
    files = log.files
    if cleaning.duplicates is Duplicates.DROP:
        folder, _ = work.step("distinct", lambda target: _drop_repeats(engine, files, log.staged.files(target)))
        files = log.staged.files(folder)
    elif cleaning.duplicates is Duplicates.ERROR and cleaning.drops_rare:
        # once rare users and items are gone, their repeats could not be seen
        _reject_repeats(engine, log, [_repeats(engine, file) for file in files])
    engine.name_table("events", files)
    vocabulary, sizes = work.step("vocabulary", lambda folder: _count(engine, log.staged, cleaning, folder))
    if not sizes["events"]:
        raise UserError(
            f"no event is left: got {log.staged.num_events} events, none of a user with {cleaning.min_user_events} and "
            f"an item with {cleaning.min_item_events} events",
            "lower data.min_user_events or data.min_item_events",
        )
    for side, name in (("users", USERS_FILE), ("items", ITEMS_FILE)):
        engine.name_table(side, [vocabulary / name])
    flat_folder = work.root / FLAT_FOLDER
    flat_folder.mkdir(exist_ok=True)
    passes = list(_passes(log, files, vocabulary, sizes["in_range"]))
    written, repeats = [], []
    with closing(FlatWriter(flat_folder, sizes["users"], sizes["events"])) as flat:
        for index, one in enumerate(passes):
            name = sequence_file(index, len(passes))
            make = partial(_write_pass, engine, one, cleaning, flat, name)
            folder, found = work.step(f"pass-{index}", make)
            written.append(folder / name)
            repeats.append(_Repeats(**found))
    _reject_repeats(engine, log, repeats)
    return [vocabulary / USERS_FILE, vocabulary / ITEMS_FILE, *written, flat_folder]


def _drop_repeats(engine: Engine, files: list[Path], results: list[Path]) -> dict[str, Any]:
    for file, result in zip(files, results, strict=True):
        engine.name_table("part", [file])
        with pq.ParquetWriter(result, pq.read_schema(file), compression="snappy", use_dictionary=False) as writer:
            for batch in engine.query(distinct_events()):
                writer.write_table(pa.Table.from_batches([batch]).cast(writer.schema))
    return {}


@dataclass(frozen=True)
class _Repeats:
    """How many rows repeat an earlier one, and the first of them."""

    count: int = 0
    first: int | None = None

    def __add__(self, other: _Repeats) -> _Repeats:
        firsts = [found.first for found in (self, other) if found.first is not None]
        return _Repeats(self.count + other.count, min(firsts, default=None))


def _repeats(engine: Engine, file: Path) -> _Repeats:
    engine.name_table("part", [file])
    found = pa.Table.from_batches(engine.query(repeated_events())).to_pylist()[0]
    return _Repeats(found["count"], found["first"])


def _reject_repeats(engine: Engine, log: Log, repeats: list[_Repeats]) -> None:
    found = sum(repeats, _Repeats())
    if found.first is None:
        return
    row = found.first
    engine.name_table("events", log.files)
    event = pa.Table.from_batches(engine.query(event_at(row))).to_pylist()[0]
    raise UserError(
        f"{log.origin.locate(row)}: user {event['user_key']!r}, item {event['item_key']!r}, time {event['event_time']} "
        f"is there already ({found.count} such rows)",
        "pass data.duplicates=drop or data.duplicates=keep",
    )


def _count(engine: Engine, staged: Staged, cleaning: Cleaning, folder: Path) -> dict[str, Any]:
    """Write the vocabularies: users and items in turns, until both limits hold for all that is left."""
    files: dict[str, Path] = {}
    events: dict[str, int] = {}
    sizes: dict[str, Any] = {}
    for turn in count():
        side, other = list(SIDES)[turn % 2], list(SIDES)[(turn + 1) % 2]
        if turn >= len(SIDES) and events[side] == events[other]:
            break
        others = None if events.get(other) in (None, staged.num_events) else other
        file = folder / f"{side}-{turn}.parquet"
        batches = engine.query(count_events(side, others, cleaning.minimum[side]))
        sizes[side], events[side] = _write_vocabulary(batches, file, staged.raw_types[side])
        engine.name_table(side, [file])
        if side in files:
            files[side].unlink()
        files[side] = file
    files["users"].rename(folder / USERS_FILE)
    files["items"].rename(folder / ITEMS_FILE)
    in_range = np.zeros(staged.num_files, dtype=np.int64)
    with pq.ParquetFile(folder / USERS_FILE) as users:
        for batch in users.iter_batches(columns=["raw"]):
            in_range += np.bincount(range_of(batch.column(0), staged.bounds), minlength=staged.num_files)
    return {"events": events["users"], **sizes, "in_range": in_range.tolist()}


def _write_vocabulary(batches: Iterator[pa.RecordBatch], file: Path, raw_type: pa.DataType) -> tuple[int, int]:
    """Size of a vocabulary and number of its events."""
    events = 0
    with closing(VocabularyWriter(file, raw_type)) as writer:
        for batch in batches:
            writer.write(batch.column("raw"), batch.column("count"))
            events += pc.sum(batch.column("count")).as_py() or 0
    return writer.size, events


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """The sequences of one range of users.

    Attributes:
        file: their staged events.
        sequence: number of the first sequence.
        event: number of its first event.
        lengths: [S] events of every sequence.
        per_second: units of the staged time that are a second.
    """

    file: Path
    sequence: int
    event: int
    lengths: Ints
    per_second: int


def _passes(log: Log, files: list[Path], vocabulary: Path, in_range: list[int]) -> Iterator[_Pass]:
    """Every range that has users."""
    counts = pq.read_table(vocabulary / USERS_FILE, columns=["count"])["count"].to_numpy()
    first = event = 0
    for file, size in zip(files, in_range, strict=True):
        lengths = counts[first : first + size]
        if size:
            yield _Pass(file=file, sequence=first, event=event, lengths=lengths, per_second=log.staged.per_second)
        first, event = first + size, event + int(lengths.sum())


def _write_pass(
    engine: Engine, one: _Pass, cleaning: Cleaning, flat: FlatWriter, name: str, folder: Path
) -> dict[str, Any]:
    """Sort the events of a range and write them; looks for repeats unless they were dealt with."""
    engine.name_table("part", [one.file])
    looks = cleaning.duplicates is Duplicates.ERROR and not cleaning.drops_rare
    stream = _Stream(engine.query(sorted_events(only_known_users=cleaning.min_user_events > 1)))
    repeats = _Repeats()
    with closing(SequenceWriter(folder / name, flat, one.sequence, one.event)) as writer:
        for lengths in row_groups(one.lengths):
            rows = stream.take(int(lengths.sum()))
            if looks:
                repeats += _repeats_in(rows, lengths)
            seconds = (rows["event_time"] // one.per_second).astype(np.int64)
            writer.write(lengths, {"item_ids": rows["item_id"], "timestamps": seconds, "actions": rows["action"]})
    # a pass that is said to be finished must survive whatever ends this process
    flat.sync()
    return asdict(repeats)


class _Stream:
    """Rows of a query, taken in pieces of any size."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self._rest: list[pa.RecordBatch] = []

    def take(self, size: int) -> dict[str, npt.NDArray[Any]]:
        """The next rows as arrays; the query has that many."""
        have = sum(map(len, self._rest))
        while have < size:
            self._rest.append(next(self._batches))
            have += len(self._rest[-1])
        last = self._rest.pop()
        cut = len(last) - (have - size)
        table = pa.Table.from_batches([*self._rest, last.slice(0, cut)])
        self._rest = [last.slice(cut)]
        return {name: table[name].to_numpy() for name in table.schema.names}


def _repeats_in(rows: Mapping[str, npt.NDArray[Any]], lengths: Ints) -> _Repeats:
    """Repeats of user, item and time among whole sequences that are in order."""
    times, items = rows["event_time"], rows["item_id"]
    same = np.zeros(len(times) + 1, dtype=np.bool_)
    same[1:-1] = times[1:] == times[:-1]
    same[np.cumsum(lengths)] = False
    # events that share their time with a neighbour, and which group of equal times each belongs to
    places = np.flatnonzero(same[:-1] | same[1:])
    group = np.cumsum(~same[places])
    order = np.lexsort((rows["log_row"][places], items[places], group))
    repeated = (np.diff(group[order]) == 0) & (np.diff(items[places][order]) == 0)
    found = rows["log_row"][places][order][1:][repeated]
    return _Repeats(len(found), int(found.min()) if len(found) else None)
