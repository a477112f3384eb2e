"""prepare: idempotent, and whole or not at all, whatever kills it."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hstu_dist.data import staging
from hstu_dist.data.config import EventsConfig, PreparationConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.prepare import prepare
from hstu_dist.data.schema import load_manifest
from hstu_dist.data.writer import exclusive
from hstu_dist.errors import UserError
from hstu_dist.machine import memory_per_rank
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
    files = sorted(file for file in Path(path).iterdir() if file.is_file())
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_writers_at_once_make_one_data_set(config: EventsConfig) -> None:
    script = (
        "import logging, sys; from hstu_dist.data.config import EventsConfig; "
        "from hstu_dist.data.prepare import prepare; "
        "logging.basicConfig(level=logging.INFO); "
        "prepare(EventsConfig(input=sys.argv[1], path=sys.argv[2], user_column='user', item_column='item', "
        "timestamp_column='time'))"
    )
    command = [sys.executable, "-c", script, str(config.input), config.path]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sum(": prepared (" in output for output in outputs) == 1
    assert SequenceDataset.open(config.path).num_sequences == 300 and not leftovers(config.path)


def forked(config: EventsConfig, spoil: Callable[[], None]) -> int:
    """Exit status of a process that prepares after `spoil()`; 1 if it failed with a UserError."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            spoil()
            prepare(config)
            status = 0
        except UserError as error:
            Path(config.path).with_name("error.txt").write_text(str(error))
            status = 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class DurableCalls:
    """Counts the calls that make writing durable or visible, and dies at one of them by kill -9."""

    def __init__(self, die_at: int = 0) -> None:
        self.die_at = die_at
        self.count = 0

    def watch(self) -> None:
        """From now on, in this process."""
        os.fsync = self._watched(os.fsync)
        os.link = self._watched(os.link)
        Path.rename = self._watched(Path.rename)  # type: ignore[method-assign]

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: object) -> Any:
            self.count += 1
            if self.count == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return watched


def dying_at(step: int) -> Callable[[], None]:
    return DurableCalls(step).watch


@pytest.fixture
def many_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = staging.engine_memory(PreparationConfig().memory_bytes(memory_per_rank(1)))
    monkeypatch.setattr(staging, "_BYTES_OF_TEXT", 3 * memory // ROWS)


@pytest.fixture
def steps(config: EventsConfig, many_passes: None, monkeypatch: pytest.MonkeyPatch) -> int:
    """Durable calls of a preparation that replaces nothing."""
    calls = DurableCalls()
    with monkeypatch.context() as patched:
        for owner, name in ((os, "fsync"), (os, "link"), (Path, "rename")):
            patched.setattr(owner, name, getattr(owner, name))
        calls.watch()
        prepare(config)
    return calls.count


def check_killed_at(config: EventsConfig, step: int, right: dict[str, str], old: EventsConfig | None) -> None:
    target = Path(config.path)
    shutil.rmtree(config.path, ignore_errors=True)
    if old is not None:
        prepare(old)
    assert forked(config, dying_at(step)) == -signal.SIGKILL
    if target.exists():
        assert SequenceDataset.open(target).manifest.num_events in ((ROWS,) if old is None else (600, ROWS))
    with exclusive(target):
        assert target.exists() or old is None
    assert prepare(config).num_events == ROWS
    assert contents(config.path) == right and not leftovers(config.path)


def contents(path: str) -> dict[str, str]:
    columns = (file for file in (Path(path) / "columns").iterdir() if file.suffix == ".bin")
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in columns}
    return found | {name: content for name, (_, _, content) in state(path).items()}


@pytest.mark.slow
def test_killed_nothing_half_written_is_left(config: EventsConfig, steps: int) -> None:
    right = contents(config.path)
    assert len([name for name in right if name.startswith("sequences-")]) == 3
    for step in range(1, steps + 1, 9):
        check_killed_at(config, step, right, old=None)


@pytest.mark.slow
def test_killed_while_replacing_the_old_or_the_new_is_there(config: EventsConfig, steps: int, tmp_path: Path) -> None:
    right = contents(config.path)
    old = log_config(write_rows(tmp_path / "old.csv", 600), config.path)
    # the folder, both renames, and the folder above; one rename more than without an old data set
    for step in range(steps - 2, steps + 2):
        check_killed_at(config, step, right, old)
    prepare(old)
    assert forked(config, dying_at(steps + 2)) == 0


@pytest.mark.long
def test_killed_at_any_step(config: EventsConfig, steps: int, tmp_path: Path) -> None:
    right = contents(config.path)
    old = log_config(write_rows(tmp_path / "old.csv", 600), config.path)
    for step in range(1, steps + 1):
        check_killed_at(config, step, right, old=None)
        check_killed_at(config, step, right, old)


def dying_before(name: str) -> Callable[[], None]:
    """Dies by kill -9 when a finished step gets its name."""
    rename = Path.rename

    def renamed(file: Path, target: Path) -> Path:
        if target.name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(file, target)

    def spoil() -> None:
        Path.rename = renamed  # type: ignore[method-assign, assignment]

    return spoil


@pytest.mark.usefixtures("many_passes")
def test_a_killed_run_is_continued(config: EventsConfig, caplog: pytest.LogCaptureFixture) -> None:
    assert forked(config, dying_before("pass-1")) == -signal.SIGKILL
    with caplog.at_level(logging.INFO):
        assert prepare(config).num_events == ROWS
    assert "going on where an interrupted run stopped" in caplog.text
    assert re.findall(r"([\w-]+): finished before", caplog.text) == ["events", "vocabulary", "pass-0"]


@pytest.mark.usefixtures("many_passes")
def test_other_settings_do_not_continue_a_killed_run(config: EventsConfig, caplog: pytest.LogCaptureFixture) -> None:
    assert forked(config, dying_before("pass-1")) == -signal.SIGKILL
    with caplog.at_level(logging.INFO):
        assert prepare(log_config(Path(str(config.input)), config.path, min_user_events=10)).num_events == ROWS
    assert "finished before" not in caplog.text and not leftovers(config.path)


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_file_that_cannot_grow(config: EventsConfig) -> None:
    assert forked(config, limit_file_size) == 1
    error = Path(config.path).with_name("error.txt")
    assert "cannot be written (" in error.read_text() and "File too large" in error.read_text()
    error.unlink()
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
    with pytest.raises(UserError, match=r"cannot be written \(.*No space left on device\) -> free space or pass"):
        prepare(on_disk)
    assert [p.name for p in small_disk.iterdir()] == []
    small = log_config(write_rows(Path(str(config.input)).with_name("small.csv"), 20), small_disk / "set")
    assert prepare(small).num_events == 20
