"""A run folder belongs to one run at a time, and takes one only if it can hold it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hstu_dist.config import RunConfig, compose
from hstu_dist.errors import UserError
from hstu_dist.run_folder import RunFolder


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose(["name=x"])


def test_lock_keeps_others_out_until_it_is_left(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    with first.lock(), pytest.raises(UserError, match="another process is training in it"), second.lock():
        pass
    with second.lock():
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
