"""Logs as they are in practice: out of order, copied twice, drifting, still growing. Each has a defined result."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hstu_dist.data.config import EventsConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.events import EventLog, OpenLog
from hstu_dist.data.prepare import prepare
from hstu_dist.errors import UserError
from tests.data.cases import log_config, write_log

NOBODY = 65534
SUFFIXES = pytest.mark.parametrize("suffix", ["csv", "parquet"])


def columns(users: list[Any], start: int = 0) -> dict[str, Any]:
    return {
        "user": users,
        "item": [f"i{number % 3}" for number in range(len(users))],
        "time": [*range(start, start + len(users))],
    }


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


def opened(log: Path, tmp_path: Path) -> OpenLog:
    (tmp_path / "scratch").mkdir()
    return EventLog(log_config(log, tmp_path / "set")).open(tmp_path / "scratch")


@SUFFIXES
def test_partitions_and_rows_in_any_order(log: Path, tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(3)
    times = rng.permutation(500)
    users = rng.integers(0, 9, 500)
    for part in range(5):
        rows = slice(part * 100, part * 100 + 100)
        write_log(log / f"{part}.{suffix}", {"user": users[rows], "item": times[rows], "time": times[rows]})
    prepare(log_config(log, tmp_path / "set"))
    data = SequenceDataset.open(tmp_path / "set")
    expected = times[np.lexsort((times, users))]
    assert data.timestamps.tolist() == expected.tolist() == data.item_ids.tolist()


@SUFFIXES
def test_events_of_equal_time_follow_the_order_of_the_files(log: Path, tmp_path: Path, suffix: str) -> None:
    for part in (2, 0, 1):
        write_log(log / f"{part}.{suffix}", {"user": [1, 1], "item": [9 - 2 * part, 8 - 2 * part], "time": [5, 5]})
    prepare(log_config(log, tmp_path / "set"))
    assert SequenceDataset.open(tmp_path / "set").item_ids.tolist() == [5, 4, 3, 2, 1, 0]


@SUFFIXES
def test_a_file_that_is_there_twice(log: Path, tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    write_log(log / f"a.{suffix}", columns(["x", "y", "x"]))
    shutil.copy(log / f"a.{suffix}", log / f"b.{suffix}")
    with pytest.raises(UserError, match=rf"b.{suffix}: has the same content as .*a.{suffix} -> .*data.duplicates=drop"):
        prepare(log_config(log, tmp_path / "set"))
    assert not (tmp_path / "set").exists()
    for policy, events in (("drop", 3), ("keep", 6)):
        caplog.clear()
        assert prepare(log_config(log, tmp_path / "set", duplicates=policy)).num_events == events
        assert f"b.{suffix}: has the same content as" in caplog.text


def test_equal_files_without_events_are_no_duplicates(log: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (log / f"{name}.csv").write_text("user,item,time\n")
    write_log(log / "c.csv", columns(["x"]))
    assert prepare(log_config(log, tmp_path / "set")).num_events == 1


@SUFFIXES
def test_folders_whose_first_files_have_no_events(log: Path, tmp_path: Path, suffix: str) -> None:
    for day in range(10):
        folder = log / f"day={day:02}"
        folder.mkdir()
        empty = {name: pa.array([], pa.int64()) for name in ("user", "item", "time")}
        write_log(folder / f"app.{suffix}", empty)
        write_log(folder / f"web.{suffix}", {"user": [day, 3], "item": [1, 2], "time": [day, day]})
    assert prepare(log_config(log, tmp_path / "set")).num_events == 20


@SUFFIXES
def test_a_new_column_and_another_order_of_columns_do_not_matter(log: Path, tmp_path: Path, suffix: str) -> None:
    write_log(log / f"a.{suffix}", columns(["x"]))
    write_log(log / f"b.{suffix}", {"new": [1], **dict(reversed(columns(["y"], 5).items()))})
    assert prepare(log_config(log, tmp_path / "set")).num_users == 2


@SUFFIXES
@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"user": ["x"], "item": ["i"]}, r"b.\w+: column 'time' is missing, the file has user, item"),
        (
            {"user": ["x"], "thing": ["i"], "time": [3]},
            r"b.\w+: column 'item' is missing, the file has user, thing, time",
        ),
    ],
)
def test_a_missing_or_renamed_column(
    log: Path, tmp_path: Path, suffix: str, second: dict[str, Any], message: str
) -> None:
    write_log(log / f"a.{suffix}", columns(["x"]))
    write_log(log / f"b.{suffix}", second)
    with pytest.raises(UserError, match=message):
        prepare(log_config(log, tmp_path / "set"))
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(("set", ".set"))] == []


@pytest.mark.parametrize(
    ("retyped", "message"),
    [
        ({"time": pa.array([5.0])}, "column 'time' is double, expected int64 as in .*a.parquet"),
        ({"time": pa.array([5], pa.timestamp("us"))}, r"column 'time' is timestamp\[us\], expected int64 as in"),
        ({"user": pa.array([7])}, "column 'user' is int64, expected string as in"),
    ],
)
def test_a_retyped_column(log: Path, tmp_path: Path, retyped: dict[str, Any], message: str) -> None:
    write_log(log / "a.parquet", columns(["x"]))
    write_log(log / "b.parquet", {**columns(["y"], 4), **retyped})
    with pytest.raises(UserError, match=message):
        prepare(log_config(log, tmp_path / "set"))


def test_a_column_of_numbers_that_becomes_text_is_text_everywhere(log: Path, tmp_path: Path) -> None:
    write_log(log / "a.csv", {"user": [10, 9], "item": [1, 1], "time": [1, 2]})
    write_log(log / "b.csv", {"user": ["x"], "item": [1], "time": [3]})
    config = log_config(log, tmp_path / "set")
    assert prepare(config).num_users == 3
    from hstu_dist.data.vocabulary import Vocabulary

    assert Vocabulary.users(config.path).raw.to_pylist() == ["10", "9", "x"]


@SUFFIXES
@pytest.mark.parametrize("column", ["user", "item", "time"])
def test_nulls_in_a_later_file(log: Path, tmp_path: Path, suffix: str, column: str) -> None:
    write_log(log / f"a.{suffix}", columns(["x", "y"]))
    second = columns(["x", "y"], 4)
    write_log(log / f"b.{suffix}", {**second, column: [second[column][0], None]})
    with pytest.raises(UserError, match=rf"b.{suffix} row 2: column '{column}': got None, expected a value"):
        prepare(log_config(log, tmp_path / "set"))


@SUFFIXES
def test_a_file_that_grows_while_it_is_read(log: Path, tmp_path: Path, suffix: str) -> None:
    file = write_log(log / f"a.{suffix}", columns(["x", "y"]))
    events = opened(log, tmp_path)
    reading = events.batches()
    next(reading)
    with file.open("ab") as handle:
        handle.write(b"z,i1,9\n")
    with pytest.raises(UserError, match=rf"a.{suffix}: changed while it was read \(from \d+ to \d+ bytes\)"):
        list(reading)


@SUFFIXES
def test_a_file_that_vanishes(log: Path, tmp_path: Path, suffix: str) -> None:
    write_log(log / f"a.{suffix}", columns(["x", "y"]))
    file = write_log(log / f"b.{suffix}", columns(["x", "y"], 7))
    events = opened(log, tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=rf"b.{suffix}: (vanished while it was|cannot be) read"):
        list(events.batches())


@pytest.mark.parametrize("content", [b"", b"user,item,time\n"])
def test_empty_input(log: Path, tmp_path: Path, content: bytes) -> None:
    (log / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"a.csv: is empty|has no events"):
        prepare(log_config(log, tmp_path / "set"))


def test_no_permission(log: Path, tmp_path: Path) -> None:
    file = write_log(log / "a.csv", columns(["x"]))
    file.chmod(0)
    message = tmp_path / "message"
    message.touch(0o666)
    message.chmod(0o666)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    child = os.fork()
    if child == 0:
        try:
            # root may read everything
            if os.geteuid() == 0:
                os.setuid(NOBODY)
            EventLog(log_config(file, tmp_path / "set")).fingerprint()
        except UserError as error:
            message.write_text(str(error))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert "cannot be read" in message.read_text() and "Permission denied" in message.read_text()


def test_a_target_that_may_not_be_written(log: Path, tmp_path: Path) -> None:
    write_log(log / "a.csv", columns(["x"]))
    config: EventsConfig = log_config(log, "/proc/nowhere/set")
    with pytest.raises(UserError, match="/proc/nowhere/set: cannot be written") as caught:
        prepare(config)
    assert "data.path=FOLDER" in caught.value.remedy


def test_one_user_with_nearly_all_events(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hstu_dist.data import staging

    users = [1] * 3000 + [0, 2]
    write_log(log / "a.parquet", {"user": users, "item": [*range(3002)], "time": [*range(3002)]})
    monkeypatch.setattr(staging, "_BYTES_OF_NUMBERS", 1 << 26)
    assert prepare(log_config(log, tmp_path / "set")).max_length == 3000
    assert SequenceDataset.open(tmp_path / "set").lengths.tolist() == [1, 3000, 1]


def test_a_late_time_is_warned_about_once(log: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_log(log / "a.csv", {"user": [1], "item": [1], "time": [10**13]})
    with caplog.at_level(logging.WARNING):
        prepare(log_config(log, tmp_path / "set"))
    assert caplog.text.count("is data.timestamp_unit right?") == 1
