"""A run folder belongs to one process at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from hstu_dist.errors import UserError
from hstu_dist.run_folder import RunFolder


def test_lock_keeps_others_out_until_it_is_left(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    with first.lock(), pytest.raises(UserError, match="another process is training in it"), second.lock():
        pass
    with second.lock():
        pass
