"""The stream benchmark at a tiny size, and a prepared data set played as weeks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.play_stream import play
from benchmarks.stream import Load, steady
from hstu_dist.data.dataset import SequenceDataset
from tests.data.stream.cases import config_of, drain, pipeline_of


def test_steady_state_has_rates_memory_and_targets() -> None:
    rows, ratios = steady(Load(windows=4, events=4_000))
    found = {row.metric: row for row in rows}
    assert found["events"].n == 3 and found["events"].value > 0
    assert found["tokens with history"].value > 0 and found["memory, last tenth"].value > 50
    assert {ratio.metric: ratio.target for ratio in ratios} == {"events/s": 1.0, "memory": 1.0}


def test_a_data_set_is_played_in_order_of_time(tiny_data: Path, tmp_path: Path) -> None:
    dataset = SequenceDataset.open(tiny_data)
    weeks = play(tiny_data, tmp_path / "weeks")
    files = sorted((tmp_path / "weeks").glob("week=*/events.parquet"))
    assert weeks == len(files) > 1 and play(tiny_data, tmp_path / "weeks") == weeks
    seconds = np.concatenate([pq.read_table(file)["timestamp"].to_numpy() for file in files])
    assert (np.diff(seconds) >= 0).all() and len(seconds) == len(dataset.timestamps)
    config = config_of(tmp_path / "weeks", num_items=dataset.num_items, window_length="week", max_length=100)
    pipeline = pipeline_of(config, tmp_path)
    assert len(drain(pipeline)) == weeks
    # at the end, the histories are the sequences again, ties in their order
    kept = pipeline.histories.kept
    assert kept.users.tolist() == list(range(dataset.num_sequences))
    assert kept.items.tolist() == dataset.item_ids.tolist()


def test_a_stream_that_was_played_half_is_played_again(tiny_data: Path, tmp_path: Path) -> None:
    weeks = play(tiny_data, tmp_path / "weeks")
    (tmp_path / "weeks" / "_SUCCESS").unlink()
    assert play(tiny_data, tmp_path / "weeks") == weeks


@pytest.mark.parametrize("most", [None, 100])
def test_a_load_is_what_it_says(most: int | None, tmp_path: Path) -> None:
    Load(windows=2, events=400).write(tmp_path, most)
    files = sorted(tmp_path.glob("part-*"))
    assert len(files) == 8 and sum(pq.read_metadata(file).num_rows for file in files) == 800
