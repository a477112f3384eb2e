"""A stream that is stopped anywhere goes on as if it had not; what cannot be used is listed, once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from hstu_dist.data.stream.archive import Window
from hstu_dist.data.stream.reading import Events
from hstu_dist.data.stream.source import Source
from hstu_dist.errors import UserError
from tests.data.stream.cases import (
    HOUR,
    NUM_ITEMS,
    START,
    config_of,
    drain,
    events_of,
    pipeline_of,
    same,
    write_part,
    write_stream,
)


def quarantined(run: Path) -> list[tuple[str, str]]:
    file = run / "quarantine.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(entry["path"], entry["reason"]) for entry in entries]


def opened(run: Path, config: object) -> list[Window]:
    archive = pipeline_of(config, run).archive  # type: ignore[arg-type]
    return [archive.open(number) for number in archive.numbers()]


@pytest.mark.slow
@pytest.mark.parametrize("late", ["drop", "add"])
def test_a_restart_after_any_file_changes_nothing(late: str, tmp_path: Path) -> None:
    parts = events_of(4)
    # files that overlap in time: late events, and windows that stay open over several files
    shifted = [Events(p.users, p.items, p.seconds + (-1) ** n * 1500, p.actions) for n, p in enumerate(parts)]
    files = write_stream(tmp_path / "files", shifted)
    config = config_of(files, late=late, lateness_seconds=1000, history_mib=0.001)
    whole = drain(pipeline_of(config, tmp_path / "whole"))
    assert whole[-1].facts["late"] > 0 and whole[-1].facts["evicted_users"] > 0
    source = Source(str(files))
    listed = [file for file in source.list() if file.path.endswith(".parquet")]
    for stop in range(len(listed)):
        run = tmp_path / f"stop-{stop}"
        first = pipeline_of(config, run)
        for file in listed[: stop + 1]:
            first.take(file, source.read(file), 2e9)
            # a process that dies between two windows of its last file leaves the second one to the next process
            while first.advance() and file != listed[stop]:
                pass
        drain(pipeline_of(config, run))
        found = opened(run, config)
        assert len(found) == len(whole)
        assert all(same(a, b) for a, b in zip(found, opened(tmp_path / "whole", config), strict=True))
    total = sum(len(window.events.items) - int(window.history.sum()) for window in whole)
    read, dropped = whole[-1].facts["read"], whole[-1].facts["late"] if late == "drop" else 0
    assert total == read - dropped == sum(map(len, parts)) - dropped


def test_popularity_counts_earlier_windows(tmp_path: Path) -> None:
    parts = events_of(4)
    windows = drain(pipeline_of(config_of(write_stream(tmp_path / "files", parts)), tmp_path))
    for number, window in enumerate(windows):
        before = np.concatenate([np.empty(0, np.int64), *(part.items for part in parts[:number])])
        assert window.popularity.events.tolist() == np.bincount(before, minlength=NUM_ITEMS).tolist()


def test_files_that_cannot_be_used_are_listed_once_and_the_rest_is_read(tmp_path: Path) -> None:
    parts = events_of(4)
    files = write_stream(tmp_path / "files", parts, end=False)
    (files / "hour=0001" / "broken.parquet").write_bytes(b"PAR1 not Parquet PAR1")
    (files / "hour=0001" / "notes.txt").write_text("hello")
    copy = (files / "hour=0000" / "part-0.parquet").read_bytes()
    (files / "hour=0002" / "again.parquet").write_bytes(copy)
    (files / "_temporary" / "0").mkdir(parents=True)
    (files / "_temporary" / "0" / "part.parquet").write_bytes(b"x")
    config = config_of(files)
    for _ in range(2):
        # the second process sees all of them again before the first window
        drain(pipeline_of(config, tmp_path), at_end=False)
    reasons = dict(quarantined(tmp_path))
    assert sorted(reasons) == ["hour=0001/broken.parquet", "hour=0001/notes.txt", "hour=0002/again.parquet"]
    assert "cannot be read" in reasons["hour=0001/broken.parquet"]
    assert reasons["hour=0001/notes.txt"] == "is no .parquet, .csv or .tsv file"
    assert "content of a file that was read before" in reasons["hour=0002/again.parquet"]
    assert len(quarantined(tmp_path)) == 3
    assert opened(tmp_path, config)[-1].facts["read"] == sum(map(len, parts))


def test_what_was_set_aside_stays_so_whenever_it_is_looked_at_again(tmp_path: Path) -> None:
    files = write_stream(tmp_path / "files", events_of(2), end=False)
    config = config_of(files)
    # a day and more ahead of a clock; killed before a window was committed
    drain(pipeline_of(config, tmp_path), at_end=False, now=START - 2.0 * config.max_skew_seconds)
    assert len(quarantined(tmp_path)) == 2
    pipeline = pipeline_of(config, tmp_path)
    assert drain(pipeline) == [] and pipeline.windower.counts.read == 0 and len(quarantined(tmp_path)) == 2


def test_a_file_that_changes_after_it_was_read_is_not_read_again(tmp_path: Path) -> None:
    parts = events_of(3)
    files = write_stream(tmp_path / "files", parts, end=False)
    config = config_of(files)
    pipeline = pipeline_of(config, tmp_path)
    drain(pipeline, at_end=False)
    write_part(files, events_of(1, seed=9).pop(), "hour=0000/part-0.parquet")
    assert drain(pipeline, at_end=True)[-1].facts["read"] == sum(map(len, parts))
    ((path, reason),) = quarantined(tmp_path)
    assert path == "hour=0000/part-0.parquet" and "changed after it was read" in reason
    drain(pipeline_of(config, tmp_path), at_end=True)
    assert len(quarantined(tmp_path)) == 1


def test_a_full_disk_leaves_the_windows_that_were_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_stream(tmp_path / "files", events_of(4))
    config = config_of(files)
    whole = drain(pipeline_of(config, tmp_path / "whole"))
    saves = iter(range(10**6))

    def save(*arguments: object) -> None:
        if next(saves) == 30:
            raise OSError(28, os.strerror(28))
        kept(*arguments)  # type: ignore[arg-type]

    kept = np.save
    monkeypatch.setattr(np, "save", save)
    with pytest.raises(UserError, match=r"cannot be written \(No space left"):
        drain(pipeline_of(config, tmp_path / "full"))
    monkeypatch.undo()
    assert 0 < len(pipeline_of(config, tmp_path / "full").archive.numbers()) < len(whole)
    drain(pipeline_of(config, tmp_path / "full"))
    found = opened(tmp_path / "full", config)
    assert all(same(a, b) for a, b in zip(found, whole, strict=True))


def test_old_windows_leave_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    pipeline = pipeline_of(config_of(write_stream(tmp_path / "files", events_of(5))), tmp_path)
    drain(pipeline)
    archive = pipeline.archive
    archive.remove_before(3)
    assert archive.numbers() == [3, 4]
    archive.remove_before(99)
    assert archive.numbers() == [4]
    (archive.path(4) / "items.npy").unlink()
    with pytest.raises(UserError, match="missing or damaged") as caught:
        archive.open(4)
    assert "name=NAME" in caught.value.remedy


def test_a_file_of_many_windows_and_a_window_of_many_files(tmp_path: Path) -> None:
    seconds = START + np.arange(0, 5 * HOUR, 300)
    count = len(seconds)
    events = Events(np.arange(count) % 3, np.arange(count) % NUM_ITEMS, seconds, np.arange(count, dtype=np.int32))
    one = write_stream(tmp_path / "one", [events])
    many = write_stream(tmp_path / "many", [events.at(np.arange(n, n + 4)) for n in range(0, count, 4)])
    a = drain(pipeline_of(config_of(one), tmp_path / "a"))
    b = drain(pipeline_of(config_of(many), tmp_path / "b"))
    assert len(a) == len(b) == 5
    for x, y in zip(a, b, strict=True):
        assert x.events.actions.tolist() == y.events.actions.tolist() and x.history.tolist() == y.history.tolist()
