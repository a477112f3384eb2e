"""prepare: idempotent, and whole or not at all, whatever kills it."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hstu_dist.data.config import EventsConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.prepare import prepare
from hstu_dist.data.schema import load_manifest
from hstu_dist.data.writer import exclusive
from hstu_dist.errors import UserError
from tests.data.cases import log_config, write_log

ROWS = 3000


def write_rows(file: Path, rows: int = ROWS) -> Path:
    """A log whose ids do not compress well."""
    users = [hashlib.sha256(str(row % 300).encode()).hexdigest() for row in range(rows)]
    items = [hashlib.sha256(f"item {row}".encode()).hexdigest() for row in range(rows)]
    return write_log(file, {"user": users, "item": items, "time": list(range(rows))})


@pytest.fixture
def config(tmp_path: Path) -> EventsConfig:
    return log_config(write_rows(tmp_path / "log.csv"), tmp_path / "data" / "set")


def state(path: str) -> dict[str, tuple[int, int, str]]:
    """Inode, time and content of every file: unchanged only if nobody touched them."""
    files = sorted(Path(path).iterdir())
    return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files}


def leftovers(path: str) -> list[str]:
    target = Path(path)
    return [p.name for p in target.parent.iterdir() if p.name not in (target.name, f".{target.name}.lock")]


def test_manifest_says_what_and_from_what(config: EventsConfig) -> None:
    manifest = prepare(config)
    assert manifest == load_manifest(Path(config.path))
    assert (manifest.name, manifest.num_users, manifest.num_items, manifest.num_events) == ("events", 300, ROWS, ROWS)
    assert (manifest.mean_length, manifest.max_length) == (10.0, 10)
    digest = hashlib.sha256(Path(str(config.input)).read_bytes()).hexdigest()
    assert manifest.sources == {"log.csv": f"sha256:{digest}"}
    for name, value in manifest.files.items():
        assert value == f"sha256:{hashlib.sha256((Path(config.path) / name).read_bytes()).hexdigest()}"
    assert not leftovers(config.path)


def test_a_second_call_changes_nothing_and_says_so(config: EventsConfig, caplog: pytest.LogCaptureFixture) -> None:
    first = prepare(config)
    before = state(config.path)
    with caplog.at_level(logging.INFO):
        assert prepare(config) == first
    assert "up to date (300 users, 3,000 items, 3,000 events)" in caplog.text
    assert state(config.path) == before


def test_the_same_input_elsewhere_is_the_same_input(config: EventsConfig, tmp_path: Path) -> None:
    prepare(config)
    before = state(config.path)
    (tmp_path / "moved").mkdir()
    moved = shutil.move(str(config.input), tmp_path / "moved" / "log.csv")
    prepare(log_config(Path(moved), config.path, max_length=7))
    assert state(config.path) == before


def test_changed_settings_input_or_files_are_prepared_anew(config: EventsConfig) -> None:
    prepare(config)
    assert prepare(log_config(Path(str(config.input)), config.path, min_user_events=10)).recipe["min_user_events"] == 10
    assert prepare(config).recipe["min_user_events"] == 1
    write_rows(Path(str(config.input)), ROWS - 1)
    assert prepare(config).num_events == ROWS - 1
    assert SequenceDataset.open(config.path).lengths.sum() == ROWS - 1
    right = state(config.path)["sequences.parquet"][2]
    (Path(config.path) / "sequences.parquet").write_bytes(b"damaged")
    prepare(config)
    assert state(config.path)["sequences.parquet"][2] == right
    assert not leftovers(config.path)


def test_bad_input_leaves_the_old_data_set_alone(config: EventsConfig) -> None:
    prepare(config)
    before = state(config.path)
    Path(str(config.input)).write_text("user,item,time\n1,2,-3\n")
    with pytest.raises(UserError, match=r"row 1: column 'time': got -3"):
        prepare(config)
    assert state(config.path) == before and not leftovers(config.path)


@pytest.mark.parametrize("content", ["user,item,time\n1,2,-3\n", "user,item\n1,2\n", ""])
def test_bad_input_writes_no_data_set(tmp_path: Path, content: str) -> None:
    (tmp_path / "log.csv").write_text(content)
    with pytest.raises(UserError):
        prepare(log_config(tmp_path / "log.csv", tmp_path / "data" / "set"))
    assert not (tmp_path / "data" / "set").exists() and not leftovers(str(tmp_path / "data" / "set"))


def test_a_folder_that_is_no_data_set_is_left_alone(config: EventsConfig) -> None:
    target = Path(config.path)
    target.mkdir(parents=True)
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis.tex, which is no part of a data set -> pass data.path=FOLDER"):
        prepare(config)
    assert [p.name for p in target.iterdir()] == ["thesis.tex"]


def test_a_linked_folder_is_replaced_where_it_is(config: EventsConfig, tmp_path: Path) -> None:
    real = tmp_path / "large disk" / "set"
    real.mkdir(parents=True)
    Path(config.path).parent.mkdir()
    Path(config.path).symlink_to(real)
    prepare(config)
    assert Path(config.path).is_symlink() and SequenceDataset.open(real).num_sequences == 300


def test_a_path_that_cannot_be_written(config: EventsConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "set", tmp_path / "file"):
        with pytest.raises(UserError, match=r"cannot be written|holds file") as caught:
            prepare(log_config(Path(str(config.input)), path))
        assert "data.path=FOLDER" in caught.value.remedy


def test_a_second_writer_waits(config: EventsConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    target = Path(config.path)
    prepared = []
    second = threading.Thread(target=lambda: prepared.append(prepare(config)))
    with exclusive(target):
        second.start()
        second.join(1)
        assert second.is_alive() and not target.exists()
        assert "waiting for another process" in caplog.text
    second.join(30)
    assert prepared == [load_manifest(target)]


def test_writers_at_once_make_one_data_set(config: EventsConfig) -> None:
    running = [start_prepare(config) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sum(": prepared (" in output for output in outputs) == 1
    assert SequenceDataset.open(config.path).num_sequences == 300 and not leftovers(config.path)


# counts the calls that make writing durable, and dies at one of them as by kill -9
PREPARE_AND_DIE = """
import logging, os, pathlib, signal, sys
from hstu_dist.data.config import EventsConfig
from hstu_dist.data.prepare import prepare
from hstu_dist.errors import UserError

calls = 0

def dying(function):
    def wrapped(*arguments):
        global calls
        calls += 1
        if calls == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return wrapped

os.fsync = dying(os.fsync)
pathlib.Path.rename = dying(pathlib.Path.rename)
logging.basicConfig(level=logging.INFO)
try:
    prepare(EventsConfig(input=sys.argv[1], path=sys.argv[2], user_column="user", item_column="item",
                         timestamp_column="time"))
except UserError as error:
    sys.exit(f"UserError: {error}")
"""


def start_prepare(
    config: EventsConfig, die_at: int = 0, preexec_fn: Callable[[], None] | None = None
) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", PREPARE_AND_DIE, str(config.input), config.path, str(die_at)]
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, preexec_fn=preexec_fn)


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_at_any_step_nothing_half_written_is_left(config: EventsConfig, tmp_path: Path, replacing: bool) -> None:
    old = log_config(write_rows(tmp_path / "old.csv", 600), config.path)
    survived = False
    for step in range(1, 20):
        shutil.rmtree(config.path, ignore_errors=True)
        if replacing:
            prepare(old)
        process = start_prepare(config, die_at=step)
        process.communicate(timeout=60)
        survived = process.returncode == 0
        if survived:
            break
        assert process.returncode == -9
        if Path(config.path).exists():
            assert SequenceDataset.open(config.path).manifest.num_events in ((600, ROWS) if replacing else (ROWS,))
        with exclusive(Path(config.path)):
            assert Path(config.path).exists() or not replacing
        assert prepare(config).num_events == ROWS
        assert SequenceDataset.open(config.path).num_sequences == 300 and not leftovers(config.path)
    # four files, two folders, one rename, and one more where there is something to replace
    assert survived and step == (9 if replacing else 8)


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_file_that_cannot_grow(config: EventsConfig) -> None:
    process = start_prepare(config, preexec_fn=limit_file_size)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "UserError" in output and "cannot be written (File too large) -> free space" in output
    assert "Traceback" not in output
    assert not Path(config.path).exists() and not leftovers(config.path)
    assert prepare(config).num_events == ROWS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk takes root; test_a_file_that_cannot_grow covers the same path")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(config: EventsConfig, small_disk: Path) -> None:
    on_disk = log_config(Path(str(config.input)), small_disk / "set")
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\) -> free space or pass"):
        prepare(on_disk)
    assert [p.name for p in small_disk.iterdir()] == [".set.lock"]
    small = log_config(write_rows(Path(str(config.input)).with_name("small.csv"), 20), small_disk / "set")
    assert prepare(small).num_events == 20
