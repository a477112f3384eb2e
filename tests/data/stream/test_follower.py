"""The thread that follows a stream: it waits, keeps its distance, survives a failing source, and stops."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hstu_dist.data.stream.follower import Follower, Progress
from hstu_dist.data.stream.source import GrewError, Settling, Source, SourceFile, check_reachable
from hstu_dist.errors import UserError
from tests.data.stream.cases import config_of, events_of, pipeline_of, write_part, write_stream

PATIENCE = 20.0


@contextmanager
def following(files: Path, run: Path, **settings: Any) -> Iterator[Follower]:
    pipeline = pipeline_of(config_of(files, **settings), run)
    with Follower(Source(str(files)), pipeline) as follower:
        yield follower


def eventually(follower: Follower, window: int) -> Progress:
    return follower.poll(window, PATIENCE)


def test_windows_come_as_files_do_until_the_stream_ends(tmp_path: Path) -> None:
    parts = events_of(4)
    files = write_stream(tmp_path / "files", parts[:2], end=False)
    with following(files, tmp_path) as follower:
        assert eventually(follower, 0) is Progress.READY
        # the second window is open while nothing newer is there
        assert follower.poll(1, 0.2) is Progress.WAITING
        write_part(files, parts[2], "hour=0002/part-0.parquet")
        assert eventually(follower, 1) is Progress.READY
        write_part(files, parts[3], "hour=0003/part-0.parquet")
        (files / "_SUCCESS").touch()
        assert [eventually(follower, n) for n in (2, 3, 4)] == [Progress.READY, Progress.READY, Progress.ENDED]
    # another process finds that all is done
    with following(files, tmp_path) as follower:
        assert eventually(follower, 4) is Progress.ENDED


def test_a_declared_end_ends_the_stream(tmp_path: Path) -> None:
    files = write_stream(tmp_path / "files", events_of(6), end=False)
    with following(files, tmp_path, end="2023-11-15T01:30") as follower:
        done = 0
        while eventually(follower, done) is Progress.READY:
            done += 1
        assert follower.pipeline.windower.counts.after_end > 0 and done < 6
        read = follower.pipeline.windower.counts.read
    # nor does a session that goes on read any more
    write_part(files, events_of(1, seed=3).pop(), "hour=9999/part-0.parquet")
    with following(files, tmp_path, end="2023-11-15T01:30") as follower:
        assert eventually(follower, done) is Progress.ENDED
        assert follower.pipeline.windower.counts.read == read


@pytest.mark.slow
def test_reading_stays_a_few_windows_ahead(tmp_path: Path) -> None:
    files = write_stream(tmp_path / "files", events_of(9))
    with following(files, tmp_path, ahead=2) as follower:
        for window in range(9):
            assert eventually(follower, window) is Progress.READY
            time.sleep(0.1)
            numbers = follower.pipeline.archive.numbers()
            assert numbers[-1] <= window + 2
            # at most `ahead` windows and the ones of the file in hand are held in memory
            assert len(follower.pipeline.windower.pending) <= 1
        assert eventually(follower, 9) is Progress.ENDED


@pytest.mark.slow
def test_a_growing_file_is_read_when_it_stands_still(tmp_path: Path) -> None:
    parts = events_of(2)
    files = tmp_path / "files"
    whole = write_part(tmp_path, parts[0], "whole.parquet").read_bytes()
    growing = files / "hour=0000" / "part-0.parquet"
    growing.parent.mkdir(parents=True)
    with following(files, tmp_path, settle_seconds=0.5) as follower:
        for end in range(0, len(whole), len(whole) // 8 + 1):
            growing.write_bytes(whole[:end])
            time.sleep(0.08)
        growing.write_bytes(whole)
        write_part(files, parts[1], "hour=0001/part-0.parquet")
        assert eventually(follower, 0) is Progress.READY
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_settling() -> None:
    settling = Settling(10.0)
    a, b = SourceFile("a", 5, 1), SourceFile("b", 5, 1)
    assert settling.settled([a], now=0) == [] and settling.settled([a, b], now=9.9) == []
    assert settling.settled([a, b], now=10) == [a]
    assert settling.settled([a, SourceFile("b", 6, 1)], now=19) == [a]
    assert settling.settled([a, SourceFile("b", 6, 2)], now=28.9) == [a]
    assert settling.settled([SourceFile("b", 6, 2)], now=28.95) == []
    # a file that was gone for a while begins anew
    assert settling.settled([a], now=100) == []
    assert Settling(0.0).settled([a, b]) == [a, b]


def test_a_file_that_changes_while_it_is_read_is_left_for_later(tmp_path: Path) -> None:
    source = Source(str(tmp_path))
    (tmp_path / "a.csv").write_text("1,2\n")
    (file,) = source.list()
    assert source.read(file) == b"1,2\n"
    (tmp_path / "a.csv").write_text("1,2\n3,4\n")
    with pytest.raises(GrewError):
        source.read(file)
    (tmp_path / "a.csv").unlink()
    with pytest.raises(FileNotFoundError):
        source.read(file)


@pytest.mark.slow
def test_a_vanished_folder_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = events_of(3)
    files = write_stream(tmp_path / "files", parts[:2], end=False)
    with caplog.at_level(logging.WARNING), following(files, tmp_path) as follower:
        assert eventually(follower, 0) is Progress.READY
        files.rename(tmp_path / "elsewhere")
        deadline = time.monotonic() + PATIENCE
        while "trying again" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        (tmp_path / "elsewhere").rename(files)
        write_part(files, parts[2], "hour=0002/part-0.parquet")
        assert eventually(follower, 1) is Progress.READY
    assert "cannot be listed" in caplog.text and str(files) in caplog.text


@pytest.mark.slow
def test_a_folder_that_stays_away_ends_the_run_after_what_was_read(tmp_path: Path) -> None:
    files = write_stream(tmp_path / "files", events_of(2), end=False)
    with following(files, tmp_path, give_up_seconds=0.8) as follower:
        assert eventually(follower, 0) is Progress.READY
        shutil.rmtree(files)
        # a window that was made can still be trained on
        assert eventually(follower, 0) is Progress.READY
        with pytest.raises(UserError, match=r"cannot be listed .*, tried for") as caught:
            eventually(follower, 1)
        assert "the same command continues" in caught.value.remedy


def test_it_stops_at_once_whatever_it_waits_for(tmp_path: Path) -> None:
    files = write_stream(tmp_path / "files", events_of(9), end=False)
    for settings in ({"poll_seconds": 60.0, "ahead": 100}, {"ahead": 1}):
        with following(files, tmp_path / str(len(settings)), **settings) as follower:
            assert eventually(follower, 0) is Progress.READY
            began = time.monotonic()
        assert time.monotonic() - began < 5


@pytest.mark.slow
def test_an_idle_stream_says_so_now_and_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hstu_dist.data.stream.follower._SAY_EVERY", 0.1)
    with caplog.at_level(logging.INFO), following(tmp_path, tmp_path / "run") as follower:
        assert follower.poll(0, 0.6) is Progress.WAITING
    lines = [record.message for record in caplog.records if "no new file" in record.message]
    assert 2 <= len(lines) <= 7


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "data.path: nowhere cannot be listed"), ("abc://x/y", "data.path: got abc://x/y: Unrecognized")],
)
def test_a_stream_that_is_not_there_is_refused_before_ranks_start(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_reachable(path)


class Locked(Source):
    """Refuses one of its files, and shows another one growing whenever it is listed."""

    def read(self, file: SourceFile) -> bytes:
        if file.path.startswith("hour=0001"):
            raise PermissionError(13, "Permission denied")
        if file.path.startswith("hour=0002"):
            raise GrewError("grew")
        return super().read(file)


@pytest.mark.slow
def test_files_that_may_not_be_read_or_never_stand_still_hold_nothing_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_stream(tmp_path / "files", events_of(5), end=True)
    pipeline = pipeline_of(config_of(files, poll_seconds=0.2), tmp_path)
    with caplog.at_level(logging.INFO), Follower(Locked(str(files)), pipeline) as follower:
        assert eventually(follower, 0) is Progress.READY
        assert follower.poll(3, 1.0) is Progress.WAITING
    # the end waits for the file that grows, and nothing spins meanwhile
    assert 2 <= caplog.text.count("is left for later: grew") <= 8
    assert caplog.text.count("hour=0001/part-0.parquet is set aside: cannot be read") == 1
