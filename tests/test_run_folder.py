"""A run folder belongs to one run at a time, and takes one only if it can hold it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hstu_dist import run_folder
from hstu_dist.config import RunConfig, compose
from hstu_dist.errors import UserError
from hstu_dist.run_folder import RunFolder, commits_of


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose(["name=x"])


def test_lock_keeps_others_out_until_it_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_LOCK_SECONDS", 0.1)
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    with first.lock(), pytest.raises(UserError, match="another process is training in it"), second.lock():
        pass
    with second.lock():
        assert first.is_locked()
    assert not first.is_locked()


def test_a_look_at_the_lock_does_not_keep_a_run_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.lock():
        pass
    file = (tmp_path / ".lock").open()
    # what `is_locked` does, for longer than it does
    fcntl.flock(file, fcntl.LOCK_SH)
    assert not folder.is_locked()
    timer = threading.Timer(0.2, file.close)
    timer.start()
    with folder.lock():
        assert file.closed
    timer.join()


def test_a_reader_who_may_not_write_sees_whether_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, opened = RunFolder(tmp_path), Path.open

    # as for somebody else's file; root, who runs containers, may write any
    def open_to_read(path: Path, mode: str = "r") -> Any:
        if mode != "r":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path)

    with folder.lock():
        monkeypatch.setattr(Path, "open", open_to_read)
        assert folder.is_locked()
    assert not folder.is_locked()
    with pytest.raises(UserError, match=r"lock cannot be used \(Permission denied\)"), folder.lock():
        pass


def test_ranks_with_the_same_process_id_do_not_meet_in_the_folder(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text
    nested = iter([RunFolder(tmp_path)])

    def another_pod_does_the_same(path: Path, *arguments: Any) -> int:
        written = write(path, *arguments)
        for folder in nested:
            folder.check(config, needed_bytes=0)
        return written

    monkeypatch.setattr(os, "getpid", lambda: 17)
    monkeypatch.setattr(Path, "write_text", another_pod_does_the_same)
    RunFolder(tmp_path).check(config, needed_bytes=0)
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_are_there_need_no_more_space(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    for name in ("step-00000010", "step-00000020.1a2b3c4d.unfinished", "step-00000005.damaged"):
        (folder.checkpoints / name).mkdir(parents=True)
        (folder.checkpoints / name / "rank-00000.safetensors").write_bytes(bytes(1 << 20))
    # a run that is training removes a file between its listing and its size
    (folder.checkpoints / "step-00000010" / "manifest.json").symlink_to(tmp_path / "gone")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 << 20))
    folder.check(config, needed_bytes=5 << 20)
    with pytest.raises(UserError, match="3 MiB free, 4 MiB needed"):
        folder.check(config, needed_bytes=6 << 20)


def test_a_run_that_goes_on_with_other_code_says_so(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, commits = RunFolder(tmp_path), iter(["a", "a", "b", "b", "a"])
    monkeypatch.setattr(run_folder, "git_commit", lambda: next(commits))
    folder.describe(config)
    began = folder.environment()
    folder.describe(config)
    assert folder.environment() == began and commits_of(began) == ["a"]
    folder.describe(config)
    folder.describe(config)
    folder.describe(config)
    now = folder.environment()
    assert [later["commit"] for later in now.pop("continued")] == ["b", "a"] and now == began
    assert commits_of(folder.environment()) == ["a", "b"] and commits_of({}) == ["unknown"]
