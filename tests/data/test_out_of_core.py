"""Mapped data sets: seen exactly once at changing world sizes, in little memory, columns made again if missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hstu_dist.data.config import LoaderConfig, SyntheticZipfConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.loader import BatchLoader, Shard, popularity
from hstu_dist.data.prepare import prepare
from hstu_dist.data.split import Split, split_rows
from hstu_dist.errors import UserError

NAMES = ("offsets", "item_ids", "timestamps", "actions")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(SyntheticZipfConfig(path=str(tmp_path / "set"), num_users=500, max_events=60))
    return tmp_path / "set"


def test_every_sequence_once_for_1_2_4_3_ranks_with_a_restart_between(folder: Path) -> None:
    config = LoaderConfig(split=Split.TRAIN, global_batch_size=16, max_length=20)
    seen: list[int] = []
    batches = len(BatchLoader(SequenceDataset.open(folder), config))
    stops = [0, batches // 4, batches // 2, 3 * batches // 4, batches]
    for ranks, first, last in zip((1, 2, 4, 3), stops[:-1], stops[1:], strict=True):
        # every rank opens the data set anew, as after a restart
        loaders = [
            BatchLoader(SequenceDataset.open(folder), config, Shard(rank=rank, world_size=ranks))
            for rank in range(ranks)
        ]
        for loader in loaders:
            for _, batch in zip(range(first, last), loader.epoch(2, first), strict=False):
                seen += batch.row_ids.tolist()
    lengths = SequenceDataset.open(folder).lengths
    assert sorted(seen) == split_rows(lengths, Split.TRAIN, 20).sequences.tolist()
    assert len(seen) > 400


def test_columns_are_mapped_and_read_only(folder: Path) -> None:
    data = SequenceDataset.open(folder)
    for name in NAMES:
        assert not getattr(data, name).flags.owndata and not getattr(data, name).flags.writeable
    read = data.read(np.array([5, 0]), np.array([2, 3]))
    assert read.item_ids.tolist() == data.item_ids[[5, 6, 0, 1, 2]].tolist()
    assert read.actions.tolist() == data.actions[[5, 6, 0, 1, 2]].tolist()
    before = data.item_ids[:100].tolist()
    data.forget_pages()
    assert data.item_ids[:100].tolist() == before


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in (folder / "columns").iterdir()}


def test_missing_columns_are_made_again(folder: Path) -> None:
    before = SequenceDataset.open(folder)
    for spoil in (
        lambda: shutil.rmtree(folder / "columns"),
        lambda: (folder / "columns" / "index.json").write_text("{"),
        lambda: (folder / "columns" / "index.json").write_text("[]"),
        lambda: (folder / "columns" / "events.bin").unlink(),
        lambda: os.truncate(folder / "columns" / "events.bin", 80),
        lambda: os.truncate(folder / "columns" / "offsets.bin", 0),
    ):
        spoil()
        after = SequenceDataset.open(folder)
        for name in NAMES:
            assert np.array_equal(getattr(before, name), getattr(after, name))
    assert not [entry for entry in folder.iterdir() if "building" in entry.name]


def test_a_file_that_is_cut_short_under_a_running_reader(folder: Path) -> None:
    data = SequenceDataset.open(folder)
    os.truncate(folder / "columns" / "events.bin", 240)
    with pytest.raises(UserError, match=r"events.bin: has become shorter while it was used"):
        data.read(np.array([5]), np.array([10]))


def test_a_copied_data_set_keeps_its_columns(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    before = state(tmp_path / "copy")
    assert SequenceDataset.open(tmp_path / "copy").lengths.sum() > 0
    assert state(tmp_path / "copy") == before


def test_popularity_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = SequenceDataset.open(folder)
    whole = popularity(data)
    monkeypatch.setattr("hstu_dist.data.loader._SEQUENCES_AT_ONCE", 7)
    assert popularity(data).tolist() == whole.tolist() and whole.sum() == (data.lengths - 2).sum()


MEASURE = """
import re, sys
from pathlib import Path
from hstu_dist.data.config import LoaderConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.loader import BatchLoader
from hstu_dist.data.split import Split

def resident(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

dataset = SequenceDataset.open(sys.argv[1])
loader = BatchLoader(dataset, LoaderConfig(split=Split.TRAIN, global_batch_size=64, max_length=4096))
for _, batch in zip(range(3), loader.epoch(0)):
    pass
before, peak = resident("VmRSS"), 0
for batch in loader.epoch(0):
    peak = max(peak, resident("VmRSS"))
print((peak - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    config = SyntheticZipfConfig(path=str(tmp_path / "set"), num_users=8_000, min_events=300, max_events=800)
    size = prepare(config).num_events * 24 / 1e6
    command = [sys.executable, "-c", MEASURE, config.path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert size > 75
    assert int(done.stdout) < 50
