"""Opening a prepared data set: the right content, and every kind of damage named by file and row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu_dist.data import writer
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.flat_columns import FLAT_FOLDER
from hstu_dist.data.prepare import prepare
from hstu_dist.data.schema import MANIFEST_FILE, SEQUENCE_SCHEMA, SEQUENCES_FILE
from hstu_dist.errors import UserError
from tests.data.cases import log_config, write_log

USERS, ITEMS, TIMES = [5, 5, 9, 5, 9], [30, 10, 30, 20, 10], [3, 1, 2, 2, 2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    log = write_log(tmp_path / "log.csv", {"user": USERS, "item": ITEMS, "time": TIMES})
    prepare(log_config(log, tmp_path / "set"))
    return tmp_path / "set"


def test_other_files_in_the_folder_do_no_harm(folder: Path) -> None:
    (folder / "README.md").write_text("ours")
    shutil.rmtree(folder / FLAT_FOLDER, ignore_errors=True)
    assert SequenceDataset.open(folder).num_sequences == 2 and (folder / "README.md").exists()


def test_content(folder: Path) -> None:
    data = SequenceDataset.open(folder)
    assert (data.num_sequences, data.num_items) == (2, 3)
    assert data.offsets.tolist() == [0, 3, 5] and data.lengths.tolist() == [3, 2]
    assert data.item_ids.tolist() == [0, 1, 2, 2, 0]
    assert data.timestamps.tolist() == [1, 2, 3, 2, 2]
    assert data.item_ids.dtype == data.timestamps.dtype == data.offsets.dtype == np.int64
    assert data.actions.dtype == np.int32 and data.actions.tolist() == [0] * 5


def test_many_row_groups_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "EVENTS_PER_ROW_GROUP", 7)
    rng = np.random.default_rng(0)
    users = np.sort(rng.integers(0, 40, 300))
    items = rng.integers(0, 9, 300)
    log = write_log(tmp_path / "log.parquet", {"user": users, "item": items, "time": np.arange(300)})
    prepare(log_config(log, tmp_path / "set"))
    assert pq.ParquetFile(tmp_path / "set" / SEQUENCES_FILE).num_row_groups > 30
    data = SequenceDataset.open(tmp_path / "set")
    assert data.timestamps.tolist() == list(range(300)) and data.item_ids.tolist() == items.tolist()
    assert data.lengths.tolist() == np.unique(users, return_counts=True)[1].tolist()


def rewrite(folder: Path, **columns: Any) -> None:
    """Replace columns of the sequence file, keeping the schema."""
    old = pq.read_table(folder / SEQUENCES_FILE).to_pydict()
    table = pa.Table.from_pydict({**old, **columns}, schema=SEQUENCE_SCHEMA)
    pq.write_table(table, folder / SEQUENCES_FILE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_ids": [[0, 1, 2], [3, 0]]}, r"sequences.parquet row 1 event 0: item id not in \[0, 3\)"),
        ({"item_ids": [[0, 1, -1], [2, 0]]}, r"row 0 event 2: item id not in \[0, 3\)"),
        ({"timestamps": [[1, 3, 2], [2, 2]]}, r"row 0 event 2: timestamp is smaller than the one before"),
        ({"timestamps": [[1, 2, 3], [-2, 2]]}, r"row 1 event 0: timestamp is negative"),
        ({"timestamps": [[1, 2], [2, 2]]}, r"row 0: timestamps has another length than item_ids"),
        ({"actions": [[0, 0, 0], [0, 0, 0]]}, r"row 1: actions has another length than item_ids"),
        ({"actions": [[0, 0, 0], [0, -1]]}, r"row 1 event 1: action is negative"),
        ({"user_id": [0, 2]}, r"row 1: user_id is not the row number"),
        (
            {"user_id": [0], "item_ids": [[0, 1, 2]], "timestamps": [[1, 2, 3]], "actions": [[0, 0, 0]]},
            r"got 1 users, expected 2 as in the manifest",
        ),
        (
            {"item_ids": [[0, 1, 2], [2]], "timestamps": [[1, 2, 3], [2]], "actions": [[0, 0, 0], [0]]},
            r"got 4 events, expected 5 as in the manifest",
        ),
    ],
)
def test_wrong_content_is_named(folder: Path, columns: dict[str, Any], message: str) -> None:
    rewrite(folder, **columns)
    with pytest.raises(UserError, match=message) as caught:
        SequenceDataset.open(folder)
    assert "prepare" in caught.value.remedy


def test_another_schema(folder: Path) -> None:
    table = pq.read_table(folder / SEQUENCES_FILE)
    pq.write_table(table.drop_columns(["actions"]), folder / SEQUENCES_FILE)
    with pytest.raises(UserError, match=r"sequences.parquet: got columns user_id"):
        SequenceDataset.open(folder)


@pytest.mark.slow
def test_a_changed_byte_does_not_go_unnoticed(folder: Path) -> None:
    file = folder / SEQUENCES_FILE
    right, before = file.read_bytes(), SequenceDataset.open(folder)
    unnoticed = []
    for position in range(0, len(right), 11):
        damaged = bytearray(right)
        damaged[position] ^= 0x10
        file.write_bytes(damaged)
        try:
            after = SequenceDataset.open(folder)
        except UserError:
            continue
        for name in ("offsets", "item_ids", "timestamps", "actions"):
            if not np.array_equal(getattr(after, name), getattr(before, name)):
                unnoticed.append((position, name))
    assert not unnoticed


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_a_truncated_file(folder: Path, keep: float) -> None:
    file = folder / SEQUENCES_FILE
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(UserError, match=r"sequences.parquet: cannot be read"):
        SequenceDataset.open(folder)


def test_manifest_problems(folder: Path, tmp_path: Path) -> None:
    manifest = folder / MANIFEST_FILE
    content = json.loads(manifest.read_text())
    for text, message in (
        (json.dumps({**content, "format_version": 99}), r"got format version 99, expected 1"),
        (json.dumps([1]), r"got format version None, expected 1"),
        ("{", r"dataset.json: is damaged"),
        (json.dumps({**content, "num_items": -1}), r"dataset.json: is damaged"),
        (json.dumps({key: value for key, value in content.items() if key != "files"}), r"dataset.json: is damaged"),
    ):
        manifest.write_text(text)
        with pytest.raises(UserError, match=message):
            SequenceDataset.open(folder)
    with pytest.raises(UserError, match=r"nowhere: no prepared data set here -> .*prepare"):
        SequenceDataset.open(tmp_path / "nowhere")
