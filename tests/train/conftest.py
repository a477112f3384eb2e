"""Every test of the loop runs in a process group of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hstu_dist.distributed.process_group import process_group


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RANK", raising=False)
    with process_group("cpu", 30):
        yield
