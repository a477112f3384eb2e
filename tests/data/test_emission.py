"""Sequences emitted at a rate of 1/n: the law, and that nothing depends on the number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from hstu_dist.data.config import BatchingConfig, EmissionConfig, LoaderConfig, StochasticLengthConfig
from hstu_dist.data.emission import Emission
from hstu_dist.data.loader import BatchLoader, Shard
from hstu_dist.data.split import Split
from tests.data.cases import dataset_of

RANDOM = np.random.default_rng(3)
LENGTHS = np.clip((RANDOM.pareto(1.0, 4000) * 8).astype(np.int64) + 1, 1, 512)
ROWS = np.arange(len(LENGTHS))


@pytest.mark.parametrize("config", [EmissionConfig(scale=1.0), EmissionConfig(scale=16.0), EmissionConfig(share=0.25)])
def test_frequencies_follow_one_over_n(config: EmissionConfig) -> None:
    law = Emission(config, LENGTHS, seed=5)
    epochs = 400
    counts = np.sum([law.emitted(ROWS, LENGTHS, epoch) for epoch in range(epochs)], axis=0)
    scale = law.scale
    expected = np.minimum(1.0, scale / LENGTHS)
    deviation = (counts - epochs * expected) / np.sqrt(np.maximum(epochs * expected * (1 - expected), 1e-9))
    certain = expected == 1
    assert (counts[certain] == epochs).all()
    # 4,000 normal deviates: unit spread, none beyond six
    assert abs(deviation[~certain]).max() < 6 and deviation[~certain].std() == pytest.approx(1, abs=0.05)
    # cost of an epoch: each sequence that is not certain brings `scale` inputs on average
    inputs = (counts * LENGTHS)[~certain] / epochs
    assert inputs.mean() == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize("share", [1e-4, 0.1, 0.5, 0.999, 1.0])
def test_a_share_is_met_exactly(share: float) -> None:
    law = Emission(EmissionConfig(share=share), LENGTHS, seed=0)
    assert law.probability(LENGTHS).mean() == pytest.approx(share, rel=1e-9)


def test_draws_depend_on_seed_user_and_epoch_only() -> None:
    config = EmissionConfig(scale=8.0)
    whole = Emission(config, LENGTHS, seed=1).emitted(ROWS, LENGTHS, 2)
    some = ROWS[::-7]
    assert (Emission(config, LENGTHS[:9], seed=1).emitted(some, LENGTHS[some], 2) == whole[some]).all()
    for seed, epoch in ((1, 3), (2, 2)):
        other = Emission(config, LENGTHS, seed=seed).emitted(ROWS, LENGTHS, epoch)
        assert 0.1 < (other != whole).mean() < 0.8


@pytest.mark.parametrize("values", [{}, {"scale": 1.0, "share": 0.5}, {"share": 1.5}, {"scale": 0.0}])
def test_settings_that_mean_nothing(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EmissionConfig(**values)


def loader_of(shard: Shard | None = None, **settings: Any) -> BatchLoader:
    values: dict[str, Any] = {"split": Split.TRAIN, "global_batch_size": 16, "max_length": 64, "seed": 3, **settings}
    return BatchLoader(dataset_of((LENGTHS[:500] + 3).tolist()), LoaderConfig(**values), shard)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"batching": BatchingConfig(by="tokens", budget=300)},
        {"batching": BatchingConfig(by="flops"), "stochastic_length": StochasticLengthConfig(alpha=1.3)},
    ],
)
def test_ranks_together_emit_what_one_emits(more: dict[str, Any]) -> None:
    settings = {"emission": EmissionConfig(share=0.3), **more}
    alone = loader_of(**settings)
    ranks = [loader_of(Shard(rank=rank, world_size=3), **settings) for rank in range(3)]
    sizes = []
    for epoch in range(3):
        seen: list[int] = []
        batches = 0
        for whole, *shares in zip(alone.epoch(epoch), *(rank.epoch(epoch) for rank in ranks), strict=True):
            rows = sorted(row for share in shares for row in share.row_ids.tolist())
            assert rows == sorted(whole.row_ids.tolist())
            seen += rows
            batches += 1
        assert len(seen) == len(set(seen)) and batches == len(alone)
        sizes.append(len(seen))
    assert len(set(sizes)) > 1
    assert np.mean(sizes) == pytest.approx(0.3 * 500, rel=0.15)
    resumed = [batch.row_ids.tolist() for batch in alone.epoch(2, 1)]
    assert resumed == [batch.row_ids.tolist() for batch in alone.epoch(2)][1:]


def test_a_rate_so_small_that_batches_stay_empty() -> None:
    loader = loader_of(emission=EmissionConfig(scale=0.01))
    assert len(loader) == 1
    assert any(batch.num_sequences == 0 for epoch in range(20) for batch in loader.epoch(epoch))
