"""Synthetic data: laws of items and lengths, the same data for a seed, and a data set like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hstu_dist.data.config import SyntheticZipfConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.prepare import prepare
from hstu_dist.data.synthetic import SyntheticZipf, power_law, scattered

SMALL = SyntheticZipfConfig(num_users=500, num_items=300, max_events=200, seed=3)


@pytest.mark.parametrize("exponent", [0.0, 0.999999, 1.0, 1.2, 2.5])
@pytest.mark.parametrize("bounds", [(1, 50), (4, 4096), (3, 3)])
def test_power_law(exponent: float, bounds: tuple[int, int]) -> None:
    low, high = bounds
    values = power_law((np.arange(200_000) + 0.5) / 200_000, exponent, bounds)
    assert values.min() == low and values.max() <= high
    assert power_law(np.array([0.0, 1 - 2.0**-53]), exponent, bounds).tolist() == [low, high]
    # share of the values below the geometric mean, by integrating the density
    middle = max(low, int(np.sqrt(low * high)))
    ends = np.array([low, middle, high + 1], dtype=np.float64)
    primitive = np.log(ends) if exponent == 1 else ends ** (1 - exponent) / (1 - exponent)
    below = (primitive[1] - primitive[0]) / (primitive[2] - primitive[0])
    assert (values < middle).mean() == pytest.approx(below, abs=1e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 97, 1000, 1 << 12])
def test_scattering_is_one_to_one(count: int) -> None:
    assert sorted(scattered(np.arange(count), count).tolist()) == list(range(count))


def test_popular_items_do_not_lie_together() -> None:
    assert np.ptp(scattered(np.arange(8), 100_000)) > 50_000
    assert scattered(np.array([2**31 - 1]), 2**31)[0] >= 0


def test_sequences_are_what_the_settings_say() -> None:
    found = SyntheticZipf(SMALL).read()
    lengths = np.diff(found.offsets)
    assert len(lengths) == 500 and lengths.min() >= 4 and lengths.max() <= 200
    assert found.item_ids.min() >= 0 and found.item_ids.max() < 300 and len(found.items) == 300
    counts = np.sort(np.bincount(found.item_ids, minlength=300))[::-1]
    expected = 1 - (np.arange(1, 302.0) ** -0.2)
    assert counts[0] / counts.sum() == pytest.approx(expected[1] / expected[-1], rel=0.1)
    for start, end in zip(found.offsets[:-1], found.offsets[1:], strict=True):
        assert found.timestamps[start] == 1_500_000_000
        assert (np.diff(found.timestamps[start:end]) >= 1).all()
    assert set(found.actions.tolist()) == {1, 2, 3, 4, 5}


def test_prepared_like_any_data_set(tmp_path: Path) -> None:
    config = replace(SMALL, path=str(tmp_path / "zipf"))
    manifest = prepare(config)
    assert (manifest.num_users, manifest.num_items, manifest.sources) == (500, 300, {})
    made = {file.name: file.stat().st_mtime_ns for file in Path(config.path).iterdir()}
    assert prepare(replace(config, max_length=7)) == manifest
    assert {file.name: file.stat().st_mtime_ns for file in Path(config.path).iterdir()} == made
    dataset = SequenceDataset.open(config.path)
    assert dataset.item_ids.tolist() == SyntheticZipf(config).read().item_ids.tolist()
    assert prepare(replace(config, seed=4)).files != manifest.files


def test_lengths_in_order() -> None:
    with pytest.raises(ValueError, match=r"max_events: got 3, expected at least min_events \(4\)"):
        SyntheticZipfConfig(max_events=3)
