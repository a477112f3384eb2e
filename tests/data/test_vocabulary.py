"""Vocabulary: raw ids survive preparation, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu_dist.data.prepare import prepare
from hstu_dist.data.vocabulary import Vocabulary
from hstu_dist.errors import UserError
from tests.data.cases import log_config, write_log

LARGE = [2**53 + 1, 5, 2**31, 2**53, 5]
TEXT = ["b", "007", "zoë", "7", "007"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("raw", [LARGE, TEXT])
def test_ids_survive_preparation(tmp_path: Path, suffix: str, raw: list[Any]) -> None:
    log = write_log(tmp_path / f"log.{suffix}", {"user": raw, "item": raw[::-1], "time": [1, 2, 3, 4, 5]})
    prepare(log_config(log, tmp_path / "set"))
    for vocabulary in (Vocabulary.users(tmp_path / "set"), Vocabulary.items(tmp_path / "set")):
        assert vocabulary.raw.to_pylist() == sorted(set(raw)) and len(vocabulary) == 4
        assert vocabulary.counts.tolist() == [raw.count(value) for value in sorted(set(raw))]
        ids = vocabulary.encode(raw)
        assert ids.dtype == np.int64 and vocabulary.decode(ids) == raw
    unknown = [1] if raw is LARGE else ["nobody"]
    assert vocabulary.encode(unknown).tolist() == [-1]
    assert len(vocabulary.encode([])) == 0 and vocabulary.decode(np.zeros(0, dtype=np.int64)) == []


def test_misuse_and_damage(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", {"user": [1], "item": [1], "time": [1]})
    prepare(log_config(log, tmp_path / "set"))
    vocabulary = Vocabulary.items(tmp_path / "set")
    with pytest.raises(ValueError, match="expected 0 to 0"):
        vocabulary.decode(np.array([0, 1]))
    with pytest.raises(ValueError, match="expected int64"):
        vocabulary.encode(["text"])
    (tmp_path / "set" / "items.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"items.parquet: cannot be read"):
        Vocabulary.items(tmp_path / "set")
    with pytest.raises(UserError, match=r"users.parquet: cannot be read"):
        Vocabulary.users(tmp_path / "nowhere")
