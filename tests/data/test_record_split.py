"""Whole sequences are held out: nothing of them is trained on, and all of their events are targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hstu_dist.data.config import AppendixCConfig, LoaderConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.loader import BatchLoader, popularity
from hstu_dist.data.prepare import prepare
from hstu_dist.data.record_split import RecordSplit
from hstu_dist.data.split import Split

CUT = RecordSplit(validation_share=0.2, test_share=0.1)


@pytest.mark.parametrize(
    ("cut", "split", "expected"),
    [
        (CUT, Split.TRAIN, range(14)),
        (CUT, Split.VALIDATION, range(14, 18)),
        (CUT, Split.TRAIN_VALIDATION, range(18)),
        (CUT, Split.TEST, [18, 19]),
        (replace(CUT, train=3), Split.TRAIN, [11, 12, 13]),
        (replace(CUT, train=3), Split.TRAIN_VALIDATION, [15, 16, 17]),
        (replace(CUT, train=30), Split.TRAIN, range(14)),
        (replace(CUT, evaluated=2), Split.VALIDATION, [14, 16]),
        (replace(CUT, evaluated=9), Split.TEST, [18, 19]),
    ],
)
def test_which_sequences(cut: RecordSplit, split: Split, expected: list[int]) -> None:
    assert cut.sequences(20, split).tolist() == list(expected)


def test_batches_in_order_end_with_the_last_event(tmp_path: Path) -> None:
    config = AppendixCConfig(path=str(tmp_path), num_records=20, record_length=9, num_items=50, num_categories=10)
    prepare(config)
    data = SequenceDataset.open(tmp_path)
    events = np.asarray(data.item_ids).reshape(20, 9)
    settings = LoaderConfig(split=Split.TRAIN_VALIDATION, global_batch_size=4, shuffle=False, cut=CUT, max_length=5)
    batches = list(BatchLoader(data, settings).epoch(0))
    assert np.concatenate([batch.row_ids for batch in batches]).tolist() == list(range(18))
    assert np.concatenate([batch.item_ids for batch in batches]).tolist() == events[:18, 3:8].reshape(-1).tolist()
    assert np.concatenate([batch.target_ids for batch in batches]).tolist() == events[:18, 4:].reshape(-1).tolist()
    assert popularity(data, Split.TRAIN_VALIDATION, CUT).sum() == 18 * 9
