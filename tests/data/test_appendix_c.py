"""The synthetic stream against a plain reading of its law, one record and one event at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hstu_dist.data.appendix_c import AppendixC, Draws, distinct, event_slots, item_categories, open_limits, uniform
from hstu_dist.data.config import AppendixCConfig, prepare_command
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.prepare import prepare

SMALL = AppendixCConfig(
    num_records=200, record_length=24, num_items=150, num_categories=12, max_concentration=20, seed=5
)
LAWS = [
    SMALL,
    replace(SMALL, count_law="max", prior="even"),
    replace(SMALL, item_law="even", open_share=0.08),
    replace(SMALL, max_categories=12, max_concentration=1.0),
    replace(SMALL, item_law="simplex"),
]


def plain_record(config: AppendixCConfig, number: int, draws: Draws, b: int) -> list[int]:
    """One record as the appendix tells it."""
    existing = min(
        math.ceil((config.open_share + (1 - config.open_share) * (number / config.num_records)) * config.num_items),
        config.num_items,
    )
    left, categories = list(range(config.num_categories)), []
    for k in range(config.max_categories):
        categories.append(left.pop(int(draws.categories[k, b] * len(left))))
    count = config.max_categories
    if config.count_law == "uniform":
        count = 1 + int(draws.count[b] * count)
    weights = [1.0 if config.prior == "even" else -math.log1p(-draws.priors[k, b]) for k in range(count)]
    alpha = 1 + (config.max_concentration - 1) * draws.concentration[b]
    of_item, record, items = item_categories(config), [], []
    for n in range(1, config.record_length + 1):
        choice = draws.choice[n - 1, b]
        if draws.source[n - 1, b] < alpha / (alpha + n - 1):
            k = 0
            while k < count - 1 and choice >= sum(weights[: k + 1]) / sum(weights):
                k += 1
            category = categories[k]
        else:
            category = record[int(choice * (n - 1))]
        record.append(category)
        open_items = [item for item in range(existing) if of_item[item] == category]
        items.append(open_items[int(draws.item[n - 1, b] * len(open_items))])
    return items


@pytest.mark.parametrize("config", LAWS)
def test_records_are_those_of_the_plain_law(config: AppendixCConfig) -> None:
    stream = AppendixC(config)
    numbers = np.array([0, 1, 7, 120, 199])
    draws = stream.draws(0, len(numbers))
    assert stream.records(numbers, draws).tolist() == [
        plain_record(config, number, draws, b) for b, number in enumerate(numbers.tolist())
    ]


def test_items_open_over_time_and_only_then() -> None:
    items = np.concatenate([columns["item_ids"] for _, columns in AppendixC(SMALL).pieces()]).reshape(200, 24)
    limits = open_limits(SMALL, np.arange(200))
    assert limits[0] == 60 and (np.diff(limits) >= 0).all() and (items < limits[:, None]).all()
    assert items[:20].max() < 75 and items[-60:].max() >= 140
    categories = item_categories(SMALL)[items]
    assert max(len(set(record)) for record in categories.tolist()) <= SMALL.max_categories


def test_categories_repeat_as_often_as_the_law_says() -> None:
    """A Chinese restaurant over the prior: two events of a record share a category more often, the smaller alpha is."""
    config = replace(SMALL, num_records=20_000, record_length=20, count_law="max", prior="even", max_concentration=1.0)
    draws = AppendixC(config).draws(0, 20_000)
    slots = event_slots(config, draws)
    # alpha is 1: the second event repeats the first with 1/2, or draws it anew with 1/5
    assert (slots[1] == slots[0]).mean() == pytest.approx(0.5 + 0.5 / 5, abs=0.015)
    assert np.bincount(slots[-1], minlength=5) / 20_000 == pytest.approx(np.full(5, 0.2), abs=0.015)
    # with a large alpha, hardly more often than by chance
    wide = replace(config, max_concentration=1e9)
    slots = event_slots(wide, AppendixC(wide).draws(0, 20_000))
    assert (slots[1] == slots[0]).mean() == pytest.approx(0.2, abs=0.015)


def test_sets_of_categories_are_all_alike() -> None:
    found = distinct(uniform((1,), (3, 60_000)), 4)
    assert all(len(set(column)) == 3 for column in found.T[:1000].tolist())
    left_out = 6 - found.sum(axis=0)
    assert np.bincount(left_out) / 60_000 == pytest.approx(np.full(4, 0.25), abs=0.01)
    assert sorted(distinct(uniform((2,), (4, 1)), 4)[:, 0].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("law", ["even", "random", "simplex"])
def test_every_category_has_an_item_from_the_start(law: str) -> None:
    config = replace(SMALL, item_law=law, num_items=155)
    categories = item_categories(config)
    assert len(categories) == 155 and set(categories[:12].tolist()) == set(range(12))
    counts = np.bincount(categories)
    assert (np.ptp(counts) <= 1) == (law == "even")


@pytest.mark.slow
def test_prepared_like_any_data_set(tmp_path: Path) -> None:
    config = replace(SMALL, path=str(tmp_path / "stream"), num_records=60_000)
    manifest = prepare(config)
    assert (manifest.num_users, manifest.num_items, manifest.max_length) == (60_000, 150, 24)
    groups = pq.ParquetFile(Path(config.path) / "sequences.parquet").metadata.num_row_groups
    assert groups == 2
    dataset = SequenceDataset.open(config.path)
    expected = np.concatenate([columns["item_ids"] for _, columns in AppendixC(config).pieces()])
    assert dataset.item_ids.tolist() == expected.tolist()
    assert (np.diff(dataset.timestamps.reshape(60_000, 24)[:, 0]) == 1).all()
    # what is read of it is no part of it, its law is
    assert prepare(replace(config, max_length=3)) == manifest
    assert prepare(replace(config, seed=6)).files != manifest.files


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"max_categories: got 13, expected at most num_categories \(12\)"):
        replace(SMALL, max_categories=13)
    with pytest.raises(
        ValueError, match=r"num_categories: got 12, expected at most the 7\.5 items that are open at first"
    ):
        replace(SMALL, open_share=0.05)


def test_the_command_that_makes_a_stream_has_all_that_decides() -> None:
    command = prepare_command(replace(SMALL, path="elsewhere", max_length=9))
    assert command.startswith("python -m hstu_dist prepare data=appendix_c data.path=elsewhere data.num_records=200 ")
    assert "data.num_items=150" in command and "max_length" not in command and "open_share" not in command
    assert prepare_command(AppendixCConfig()) == "python -m hstu_dist prepare data=appendix_c"
