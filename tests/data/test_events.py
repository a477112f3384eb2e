"""Event logs: what is read survives exactly, and what cannot be used is named by file, row, column and value."""

from __future__ import annotations

import gzip
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hstu_dist.data.config import EventsConfig
from hstu_dist.data.events import EventLog, EventTable
from hstu_dist.data.log_files import find_files
from hstu_dist.errors import UserError
from tests.data.cases import log_config, read_log, write_log

LARGE = [2**31, 2**31 + 1, 2**53, 2**53 + 1, 2**53 + 2, 2**63 - 1, -(2**63), 0]
GOOD = {"user": [1, 1, 2], "item": [7, 8, 7], "time": [10, 20, 30]}


def read(file: Path, **settings: Any) -> EventTable:
    return read_log(log_config(file, **settings))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_large_ids_survive(tmp_path: Path, suffix: str) -> None:
    n = len(LARGE)
    file = write_log(tmp_path / f"log.{suffix}", {"user": LARGE, "item": LARGE[::-1], "time": list(range(n))})
    events = read(file)
    assert events.users.to_pylist() == LARGE and events.items.to_pylist() == LARGE[::-1]
    assert events.users.type == pa.int64() and events.seconds.dtype == np.int64


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_text_ids_survive(tmp_path: Path, suffix: str) -> None:
    ids = ["007", "7", "zoë, 'x'", ' "q" ', "NA", "1e3"]
    file = write_log(tmp_path / f"log.{suffix}", {"user": ids, "item": ids[::-1], "time": [1] * len(ids)})
    events = read(file)
    assert events.users.to_pylist() == ids and events.items.to_pylist() == ids[::-1]


def test_text_of_parquet_stays_text(tmp_path: Path) -> None:
    ids = ["3", "1", "1" * 30]
    assert read(write_log(tmp_path / "log.parquet", {**GOOD, "user": ids})).users.to_pylist() == ids
    file = write_log(tmp_path / "log.parquet", {**GOOD, "user": ["3", "1", "2"]})
    assert read(file).users.to_pylist() == ["3", "1", "2"]


def test_csv_numbers_are_numbers_though_quoted(tmp_path: Path) -> None:
    assert read(write_log(tmp_path / "log.csv", {**GOOD, "user": ["3", "1", "2"]})).users.to_pylist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (pa.array([3, 1, 2], pa.uint64()), [3, 1, 2]),
        (pa.array([3, 1, 2], pa.int8()), [3, 1, 2]),
        (pa.array([3.0, 1.0, 2.0]), [3, 1, 2]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["b", "a", "b"]),
        (pa.array([7, 5, 7]).dictionary_encode(), [7, 5, 7]),
        (pa.array(["b", "a", "c"], pa.large_string()), ["b", "a", "c"]),
    ],
)
def test_id_types_of_parquet(tmp_path: Path, user: pa.Array, expected: list[Any]) -> None:
    assert read(write_log(tmp_path / "log.parquet", {**GOOD, "user": user})).users.to_pylist() == expected


NOON = datetime(2024, 1, 31, 12, 0, 0, 500_000)
SECONDS = 1_706_702_400


@pytest.mark.parametrize(
    ("suffix", "times", "unit"),
    [
        ("parquet", pa.array([NOON], pa.timestamp("us")), "s"),
        ("parquet", pa.array([NOON], pa.timestamp("ms", "UTC")), "s"),
        ("parquet", pa.array([NOON], pa.timestamp("ns")), "s"),
        ("csv", pa.array([NOON], pa.timestamp("us")), "s"),
        ("csv", pa.array(["2024-01-31T12:00:00Z"]), "s"),
        ("csv", pa.array(["2024-01-31T14:00:00.5+02:00"]), "s"),
        ("csv", pa.array([SECONDS + 0.5]), "s"),
        ("parquet", pa.array(["2024-01-31T12:00:00"], pa.string_view()), "s"),
        ("parquet", pa.array([SECONDS * 1000 + 999]), "ms"),
        ("parquet", pa.array([SECONDS * 1000.0 + 999]), "ms"),
        ("csv", pa.array([SECONDS * 10**6 + 1]), "us"),
    ],
)
def test_times_become_whole_seconds(tmp_path: Path, suffix: str, times: pa.Array, unit: str) -> None:
    file = write_log(tmp_path / f"log.{suffix}", {"user": [1], "item": [2], "time": times})
    assert read(file, timestamp_unit=unit).seconds.tolist() == [SECONDS]


@pytest.mark.parametrize("dtype", [pa.date32(), pa.date64()])
def test_dates_are_midnight(tmp_path: Path, dtype: pa.DataType) -> None:
    times = pa.array([date(2024, 1, 31)], dtype)
    events = read(write_log(tmp_path / "log.parquet", {"user": [1], "item": [2], "time": times}))
    assert events.seconds.tolist() == [SECONDS - 12 * 3600]


def test_actions(tmp_path: Path) -> None:
    file = write_log(tmp_path / "log.csv", {**GOOD, "stars": [5, 0, 2**31 - 1]})
    assert read(file, action_column="stars").actions.tolist() == [5, 0, 2**31 - 1]
    assert read(file).actions.tolist() == [0, 0, 0] and read(file).actions.dtype == np.int32


@pytest.mark.slow
def test_a_late_text_id_makes_the_whole_csv_column_text(tmp_path: Path) -> None:
    n = 200_000
    users = [str(i) for i in range(n)] + ["x"]
    file = write_log(tmp_path / "log.csv", {"user": users, "item": [1] * (n + 1), "time": [1] * (n + 1)})
    assert file.stat().st_size > 2**21
    assert read(file).users.to_pylist() == users


def test_folder_and_glob_read_files_in_order(tmp_path: Path) -> None:
    for day in (2, 1):
        (tmp_path / f"day={day}").mkdir()
        write_log(tmp_path / f"day={day}" / "log.csv", {**GOOD, "item": [day] * 3})
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "notes.txt").write_text("not a log")
    for hidden in ("_delta_log", "_temporary/0", ".ipynb_checkpoints"):
        (tmp_path / hidden).mkdir(parents=True)
        write_log(tmp_path / hidden / "log.csv", {**GOOD, "item": [9] * 3})
    for config in (log_config(tmp_path), log_config(tmp_path / "*" / "*.csv")):
        log = EventLog(config)
        assert list(log.fingerprint()) == ["day=1/log.csv", "day=2/log.csv"]
        assert read_log(config).items.to_pylist() == [1, 1, 1, 2, 2, 2]
    assert read_log(log_config(tmp_path)).origin.locate(4) == f"{tmp_path}/day=2/log.csv row 2"


def test_a_glob_finds_hidden_files_only_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "_x/b", "d/c", "d/.e/f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.csv").touch()
    monkeypatch.chdir(tmp_path)
    for pattern, names in {
        "*.csv": ["a"],
        "**/*.csv": ["a", "d/c"],
        "_x/*.csv": ["_x/b"],
        f"{tmp_path}/*/*.csv": ["d/c"],
        f"{tmp_path}/**/.e/*.csv": ["d/.e/f"],
        f"../{tmp_path.name}/*/*.csv": ["d/c"],
        ".": ["a", "d/c"],
    }.items():
        assert [Path(file.path).resolve() for file in find_files(pattern)] == [tmp_path / f"{n}.csv" for n in names]


def test_compressed_tab_separated(tmp_path: Path) -> None:
    file = tmp_path / "log.tsv.gz"
    file.write_bytes(gzip.compress(b"user\titem\ttime\n1\t2\t3\n"))
    assert read(file).items.to_pylist() == [2]


def test_formats_are_told_by_the_name_of_the_file_in_any_case(tmp_path: Path) -> None:
    file = tmp_path / "clicks.tsv.export" / "LOG.CSV.GZ"
    file.parent.mkdir()
    file.write_bytes(gzip.compress(b"user,item,time\n1,2,3\n"))
    assert read(file).items.to_pylist() == [2]


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    file.write_bytes(b"\xef\xbb\xbfuser,item,time\r\n1,a,3\r\n")
    assert read(file).items.to_pylist() == ["a"]


def test_a_wrong_unit_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_log(tmp_path / "log.csv", {"user": [1], "item": [1], "time": [SECONDS * 1000]})
    read(file)
    assert "is data.timestamp_unit right?" in caplog.text
    caplog.clear()
    read(file, timestamp_unit="ms")
    assert caplog.text == ""


BAD_COLUMNS: list[tuple[str, dict[str, Any], str]] = [
    ("csv", {"time": [10, -3, 30]}, r"log.csv row 2: column 'time': got -3, expected a time since 1970"),
    ("parquet", {"time": [10, -3, 30]}, r"log.parquet row 2: column 'time': got -3, expected a time since 1970"),
    ("parquet", {"time": [10.0, float("nan"), 3.0]}, r"row 2: column 'time': got nan, expected a value"),
    ("parquet", {"time": [10.0, float("inf"), 3.0]}, r"row 2: column 'time': got inf, expected a time"),
    ("parquet", {"time": [10, 20, None]}, r"row 3: column 'time': got None, expected a value"),
    ("csv", {"time": ["10", "NaN", "30"]}, r"row 2: column 'time': got 'NaN', expected a number or a date"),
    ("parquet", {"time": pa.array([1, -1, 1], pa.timestamp("ns"))}, r"row 2: .* got -1 as timestamp\[ns\], expected"),
    ("parquet", {"time": pa.array(["10", "soon", "30"], pa.string_view())}, r"row 2: column 'time': got 'soon', exp"),
    ("parquet", {"time": pa.array(["10", "soon", "30"]).dictionary_encode()}, r"row 2: column 'time': got 'soon', e"),
    (
        "parquet",
        {"time": pa.array([b"\xff", b"10", b"30"]).view(pa.string())},
        r"row 1: .* got b'\\xff', expected a num",
    ),
    ("csv", {"time": [10, None, 30]}, r"row 2: column 'time': got None, expected a value"),
    ("csv", {"time": ["10", "soon", "30"]}, r"row 2: column 'time': got 'soon', expected a number or a date"),
    ("csv", {"time": ["2024-01-31", "31.1.24", "x"]}, r"row 2: column 'time': got '31.1.24', expected a number or"),
    ("parquet", {"time": [True, False, True]}, r"column 'time': got type bool, expected numbers or dates"),
    ("parquet", {"time": pa.array([1.0, 2.0**24, 3.0], pa.float32())}, r"row 2: column 'time': .* float holds exactly"),
    ("parquet", {"time": pa.array([1, 2**63, 3], pa.uint64())}, r"row 2: column 'time': .* fits int64"),
    ("parquet", {"user": [1, None, 2]}, r"row 2: column 'user': got None, expected a value"),
    ("csv", {"user": [1, None, 2]}, r"row 2: column 'user': got None, expected a value"),
    ("parquet", {"user": [1.0, float("nan"), 2.0]}, r"row 2: column 'user': got nan, expected a value"),
    ("parquet", {"user": [1.0, 2.5, 2.0]}, r"row 2: column 'user': got 2.5, expected an integer that double holds"),
    ("csv", {"user": [1.0, 2.5, 2.0]}, r"row 2: column 'user': got 2.5, expected an integer that double holds"),
    ("parquet", {"user": [1.0, 2.0**53, 2.0]}, r"row 2: column 'user': got 9007199254740992.0, expected an integer"),
    ("parquet", {"user": pa.array([1, 2**24, 2], pa.float32())}, r"row 2: column 'user': .* float holds exactly"),
    ("parquet", {"user": pa.array([1, 2**63, 2], pa.uint64())}, r"row 2: column 'user': got 9223372036854775808, exp"),
    ("csv", {"user": ["1", str(2**63), "2"]}, r"row 2: column 'user': got '9223372036854775808', expected .* int64"),
    ("csv", {"user": ["1", str(-(2**63) - 1), "2"]}, r"row 2: column 'user': got '-9223372036854775809', expected"),
    ("csv", {"user": ["1", "1" * 40, "2"]}, r"row 2: column 'user': got '1{40}', expected .* int64"),
    ("parquet", {"user": ["a", "", "b"]}, r"row 2: column 'user': got '', expected an id"),
    (
        "parquet",
        {"user": pa.array([b"a", b"Jos\xe9", b"b"]).view(pa.string())},
        r"row 2: column 'user': got b'Jos\\xe9', expected text in UTF-8",
    ),
    ("parquet", {"user": [[1], [2], [3]]}, r"column 'user': got type list.*, expected integers or text"),
    ("parquet", {"user": pa.nulls(3)}, r"row 1: column 'user': got None"),
]


@pytest.mark.parametrize(("suffix", "columns", "message"), BAD_COLUMNS)
def test_bad_values_are_named(tmp_path: Path, suffix: str, columns: dict[str, Any], message: str) -> None:
    file = write_log(tmp_path / f"log.{suffix}", {**GOOD, **columns})
    with pytest.raises(UserError, match=message) as caught:
        read(file)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([1, -1, 2], r"got -1, expected an action in \[0, 2\^31\)"),
        ([1, 2**31, 2], r"got 2147483648, expected an action"),
        ([1, None, 2], r"got None, expected a value"),
        ([1.0, 3.5, 2.0], r"got 3.5, expected an integer"),
        (["buy", "view", "buy"], r"got type large_string, expected integers"),
    ],
)
def test_bad_actions_are_named(tmp_path: Path, actions: list[Any], message: str) -> None:
    file = write_log(tmp_path / "log.parquet", {**GOOD, "what": actions})
    with pytest.raises(UserError, match=message):
        read(file, action_column="what")


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("log.csv", b"", r"log.csv: is empty"),
    ("log.csv", b"user,item,time\n", r"has no events"),
    ("log.csv", b"user,item\n1,2\n", r"column 'time' is missing, the file has user, item"),
    ("log.csv", b"user,item,item,time\n1,2,3,4\n", r"column 'item' is there more than once"),
    ("log.csv", b"user,item,time\n1,2,3\n1,2\n", r"log.csv: cannot be read \(CSV parse error: .*Expected 3 columns"),
    ("log.csv", b"user,item,time\n\xff\xfe,2,3\n", r"log.csv: cannot be read \(.*invalid UTF8"),
    ("log.csv", b"user,item,\xff\n1,2,3\n", r"log.csv: cannot be read \(.*codec can't decode"),
    ("log.csv.gz", b"user,item,time\n1,2,3\n", r"log.csv.gz: cannot be read"),
    ("log.parquet", b"PAR1 this is not Parquet PAR1", r"log.parquet: cannot be read"),
    ("log.parquet", b"x", r"log.parquet: cannot be read"),
    ("log.json", b"{}", r"got .*log.json, expected one of .csv"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_damaged_parquet_page_is_an_error(tmp_path: Path) -> None:
    file = write_log(tmp_path / "log.parquet", {name: values * 1000 for name, values in GOOD.items()})
    content = bytearray(file.read_bytes())
    content[4:60] = b"\xff" * 56
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"log.parquet: cannot be read"):
        read(file)


def test_files_that_disagree(tmp_path: Path) -> None:
    write_log(tmp_path / "a.parquet", GOOD)
    write_log(tmp_path / "b.parquet", {**GOOD, "user": ["x", "y", "z"]})
    with pytest.raises(UserError, match=r"b.parquet: column 'user' is string, expected int64 as in .*a.parquet"):
        read(tmp_path)


def test_formats_are_not_mixed(tmp_path: Path) -> None:
    write_log(tmp_path / "a.csv", GOOD)
    write_log(tmp_path / "b.parquet", {name: [str(value) for value in values] for name, values in GOOD.items()})
    with pytest.raises(UserError, match=r"b.parquet: got another format than .*a.csv"):
        read(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.input: missing") as caught:
        EventLog(EventsConfig())
    assert "data.input=FILE" in caught.value.remedy
    with pytest.raises(UserError, match=r"got .*nothing.csv: no such file"):
        EventLog(log_config(tmp_path / "nothing.csv"))
    with pytest.raises(UserError, match=r"folder without CSV or Parquet files"):
        EventLog(log_config(tmp_path))
