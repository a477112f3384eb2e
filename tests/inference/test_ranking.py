"""Ranking models by M-FALCON: each candidate gets what the training code predicts of it as the next event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu_dist.batch import JaggedBatch
from hstu_dist.inference.cache import StateCache
from hstu_dist.inference.ranking import RankingModel
from hstu_dist.inference.requests import UNKNOWN, Requests
from hstu_dist.losses.config import HeadConfig
from hstu_dist.losses.multi_task import answers_of
from hstu_dist.models.ranking import RankingTower
from hstu_dist.models.ranking_shape import RankingShape
from hstu_dist.ops import backends
from tests.models.ranking_cases import ENCODERS, MAX_EVENTS, SHAPE, WIDTH, tower_of

TOLERANCE = 1e-5
HEADS = (
    HeadConfig(name="click", kind="binary", column="is_click"),
    HeadConfig(name="stars", kind="regression", column="stars", offset=3.6, scale=1.1),
    HeadConfig(name="played", kind="regression", column="play_time", transform="log1p", scale=0.1),
)
BACKENDS = [str(backend) for backend in backends.available(torch.device("cpu"))]
VARIANTS = {
    **ENCODERS,
    "window": replace(ENCODERS["hstu"], window=4, global_prefix=1),  # type: ignore[call-arg]
    "input_time": replace(ENCODERS["hstu"], input_time=True),  # type: ignore[call-arg]
}
LENGTHS, COUNTS = (0, 1, MAX_EVENTS - 1, 4, 0), (3, 2, 7, 0, 0)
TABLE = torch.randn(SHAPE.num_items, WIDTH, generator=torch.Generator().manual_seed(3))


def tower(name: str = "hstu", shape: RankingShape = SHAPE, backend: str = "auto") -> RankingTower:
    made = tower_of(replace(VARIANTS[name], backend=backend), shape)
    assert isinstance(made, RankingTower)
    with torch.no_grad():
        # large enough that every action, time and feature matters
        for weight in made.features.parameters():
            weight.normal_()
    return made.requires_grad_(False).eval()


def requests_of(lengths: Sequence[int], counts: Sequence[int], seed: int = 0, contextual: bool = True) -> Requests:
    random = np.random.default_rng(seed)
    gaps = [random.integers(0, 10 ** random.integers(1, 8), length + 1) for length in lengths]
    times = [10**9 + np.cumsum(own) for own in gaps]
    total = sum(lengths)
    return Requests(
        offsets=np.cumsum([0, *lengths]),
        item_ids=random.integers(0, SHAPE.num_items, total),
        timestamps=np.concatenate([np.empty(0, dtype=np.int64), *(own[:-1] for own in times)]),
        actions=random.integers(0, 1 << 24, total),
        candidate_offsets=np.cumsum([0, *counts]),
        candidate_ids=random.integers(0, SHAPE.num_items, sum(counts)),
        times=np.array([own[-1] for own in times], dtype=np.int64),
        users=[f"user-{index}" for index in range(len(lengths))],
        contextual=random.integers(UNKNOWN, 3, (len(lengths), 2)) if contextual else None,
    )


def alone(model: RankingTower, requests: Requests) -> Tensor:
    """Predictions [M, K] by the training code: each candidate as the last event of a sequence of its own."""
    rows = []
    for user in range(requests.count):
        events = slice(int(requests.offsets[user]), int(requests.offsets[user + 1]))
        for place in range(*requests.candidate_offsets[user : user + 2]):
            items = torch.tensor([*requests.item_ids[events], max(0, requests.candidate_ids[place])])
            times = torch.tensor([*requests.timestamps[events], requests.times[user]])
            batch = JaggedBatch(
                item_ids=items,
                timestamps=times,
                query_times=times,
                # its own action, which nobody knows, must not matter
                actions=torch.tensor([*requests.actions[events], 12_345], dtype=torch.int32),
                target_ids=items,
                offsets=torch.tensor([0, len(items)]),
                row_ids=torch.tensor([user]),
                contextual=None
                if requests.contextual is None
                else torch.from_numpy(requests.contextual[user : user + 1]),
            )
            rows.append(model(TABLE[items], batch, None)[-1])
    return torch.stack(rows) if rows else torch.empty(0, len(HEADS))


def assert_alone(model: RankingModel, reference: RankingTower, requests: Requests, micro_batch: int) -> None:
    expected = answers_of(alone(reference, requests), HEADS).numpy()
    expected[requests.candidate_ids == UNKNOWN] = np.nan
    got = model.score(requests, micro_batch)
    assert tuple(got) == ("predicted_click", "predicted_stars", "predicted_played")
    for place, values in enumerate(got.values()):
        assert np.allclose(values, expected[:, place], rtol=0, atol=TOLERANCE, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_training_code_on_each_candidate_alone(name: str, backend: str) -> None:
    reference, requests = tower(name, backend=backend), requests_of(LENGTHS, COUNTS)
    cache = StateCache(1 << 20)
    cached = RankingModel(reference, TABLE, HEADS, cache)
    for micro_batch in (1024, 2):
        assert_alone(RankingModel(reference, TABLE, HEADS), reference, requests, micro_batch)
        assert_alone(cached, reference, requests, micro_batch)
    assert cache.statistics.hits == len(LENGTHS)
    assert alone(reference, requests).std(0).min() > 1e-3


def test_without_contextual_features() -> None:
    reference = tower(shape=replace(SHAPE, contextual=()))
    requests = requests_of(LENGTHS, COUNTS, contextual=False)
    assert_alone(RankingModel(reference, TABLE, HEADS), reference, requests, 1024)


def test_a_longer_history_costs_its_new_tokens_and_other_features_cost_all() -> None:
    reference, cache = tower(), StateCache(1 << 20)
    model = RankingModel(reference, TABLE, HEADS, cache)
    computed: list[int] = []
    encode = model.scorer.encoder.encode

    def counting(vectors: Tensor, context: Any) -> Tensor:
        computed.append(vectors.shape[0])
        return encode(vectors, context)

    model.scorer.encoder = replace(model.scorer.encoder, encode=counting)
    whole = requests_of((8,), (2,))
    for events, changes, expected in (
        (5, {}, 2 + 2 * 5 + 2),
        # later, of the same events: nothing but the candidates depends on the time of the request
        (5, {"times": whole.times + 10**6}, 2),
        (8, {}, 2 * 3 + 2),
        (8, {"contextual": whole.contextual + 1}, 2 + 2 * 8 + 2),  # type: ignore[operator]
        (8, {"contextual": whole.contextual + 1, "actions": whole.actions ^ (np.arange(8) == 6)}, 2 * 1 + 1 + 2),  # type: ignore[operator]
    ):
        cut = replace(whole, **changes).most_recent(8)
        cut = replace(
            cut,
            offsets=np.array([0, events]),
            item_ids=cut.item_ids[:events],
            timestamps=cut.timestamps[:events],
            actions=cut.actions[:events],
        )
        computed.clear()
        assert_alone(model, reference, cut, 1024)
        assert computed == [expected]


def test_candidates_see_neither_each_other_nor_themselves_twice() -> None:
    model, requests = RankingModel(tower(), TABLE, HEADS), requests_of((6, 3), (5, 4))
    before = model.score(requests, 1024)
    others = replace(requests, candidate_ids=np.where(np.arange(9) == 2, requests.candidate_ids, 7))
    doubled = replace(
        requests, candidate_offsets=np.array([0, 9, 9]), candidate_ids=np.repeat(requests.candidate_ids[2], 9)
    )
    for name, values in before.items():
        assert np.allclose(model.score(others, 1024)[name][2], values[2], rtol=0, atol=TOLERANCE)
        assert np.allclose(model.score(doubled, 4)[name], values[2], rtol=0, atol=TOLERANCE)


def test_unknown_candidates_have_no_answer_and_change_no_other() -> None:
    reference, requests = tower(), requests_of((6, 0), (5, 4))
    unknown = np.where(np.arange(9) % 3 == 1, UNKNOWN, requests.candidate_ids)
    assert_alone(RankingModel(reference, TABLE, HEADS), reference, replace(requests, candidate_ids=unknown), 3)


@pytest.mark.slow
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, MAX_EVENTS - 1), max_size=4),
    counts=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    micro_batch=st.integers(1, 8),
    seeds=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    room=st.sampled_from([0, 4_000, 1 << 20]),
)
def test_any_division_and_any_cache(
    lengths: list[int], counts: list[int], micro_batch: int, seeds: list[int], room: int
) -> None:
    reference, cache = tower(), StateCache(room)
    model = RankingModel(reference, TABLE, HEADS, cache)
    # the same users again, with other histories and features
    for seed in seeds:
        assert_alone(model, reference, requests_of(lengths, counts[: len(lengths)], seed), micro_batch)
        assert cache.num_bytes <= room
