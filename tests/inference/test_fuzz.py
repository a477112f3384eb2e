"""Whatever comes in, the answer is a typed error or the right score; nothing else."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hstu_dist.commands.trained import Trained, load_trained, run_of
from hstu_dist.inference.batches import MicroBatch
from hstu_dist.inference.cache import StateCache
from hstu_dist.inference.config import ModelUse
from hstu_dist.inference.messages import BadJsonError, Reader, RetrieveAsk, ScoreAsk, requests_of
from hstu_dist.inference.mfalcon import Scorer
from hstu_dist.inference.requests import RequestError, Requests
from tests.inference.cases import VARIANTS, candidates_of, encoder_of, history_of, one_by_one

FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
LIMITS = (40, 50)


@pytest.fixture(scope="session")
def model(tiny_run: Any) -> Trained:
    return load_trained(*run_of(tiny_run, ()), ModelUse(device="cpu", threads=1), StateCache(1 << 20))


numbers = st.one_of(st.integers(-3, 45), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
things = st.recursive(
    numbers, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@st.composite
def bodies(draw: Any) -> bytes:
    """Requests that are right, nearly right, or anything at all."""
    length = draw(st.integers(0, 45))
    good: dict[str, Any] = {
        "history": {
            "item_ids": draw(st.lists(st.integers(0, 41), min_size=length, max_size=length)),
            "timestamps": sorted(draw(st.lists(st.integers(0, 2**40), min_size=length, max_size=length))),
        },
        "candidates": draw(st.lists(st.integers(0, 41), max_size=55)),
    }
    for name, values in (("user", st.text(max_size=3)), ("time", st.integers(0, 2**41)), ("k", st.integers(0, 50))):
        if draw(st.booleans()):
            good[name] = draw(values)
    if draw(st.booleans()):
        where = draw(st.sampled_from([good, good["history"]]))
        where[draw(st.sampled_from([*where, "other"]))] = draw(things)
    text = json.dumps(good).encode()
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.binary(max_size=3)) + text[place + draw(st.integers(0, 3)) :]
    return text


@pytest.mark.distributed
@FUZZ
@given(body=bodies(), policy=st.sampled_from(["error", "skip"]))
def test_any_body_gives_scores_or_a_typed_error(body: bytes, policy: Any, model: Trained) -> None:
    for form in (ScoreAsk, RetrieveAsk):
        try:
            ask = Reader(form).read(body)  # type: ignore[type-var]
            candidates = ask.candidates if isinstance(ask, ScoreAsk) else []
            requests = model.inputs.ready(requests_of(ask, candidates, model.inputs, LIMITS), policy)
        except (RequestError, BadJsonError):
            continue
        if isinstance(ask, RetrieveAsk):
            best = model.retrieval.retrieve(requests, ask.k or 10, ask.exclude_seen)
            found = best.ids[0][best.ids[0] >= 0]
            assert len(set(found.tolist())) == len(found)
            assert not (ask.exclude_seen and set(found.tolist()) & set(requests.item_ids.tolist()))
            continue
        scores = model.model.score(requests, 16)["scores"]
        undefined = (requests.candidate_ids < 0) | (len(requests.item_ids) == 0)
        assert np.array_equal(np.isnan(scores), undefined)
        # the cache and the size of a micro-batch change nothing
        alone = Requests(**{**vars(requests), "users": None})
        assert np.allclose(model.model.score(alone, 1024)["scores"], scores, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.slow
@FUZZ
@given(
    lengths=st.lists(st.integers(0, 12), max_size=4),
    counts=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    sizes=st.tuples(st.integers(1, 8), st.integers(1, 20)),
    seeds=st.lists(st.integers(0, 2), min_size=2, max_size=3),
    room=st.sampled_from([0, 3_000, 1 << 20]),
)
def test_any_division_and_any_cache_give_what_one_by_one_gives(
    lengths: list[int], counts: list[int], sizes: tuple[int, int], seeds: list[int], room: int
) -> None:
    encoder = encoder_of(VARIANTS["widths"])
    scorer, cache = Scorer(encoder), StateCache(room)
    # the same users again, with other histories
    for seed in seeds:
        history = history_of(lengths, seed)
        candidates = candidates_of(counts[: len(lengths)], history)
        got = scorer.score(history, candidates, MicroBatch(candidates=sizes[0], tokens=sizes[1]), cache)
        at_candidates, at_last = one_by_one(encoder, history, candidates)
        assert cache.num_bytes <= room
        for ours, theirs in ((got.candidates, at_candidates), (got.last, at_last)):
            assert ours.shape == theirs.shape and (not ours.numel() or float((ours - theirs).abs().max()) <= 1e-5)


@pytest.mark.distributed
def test_a_million_candidates(model: Trained) -> None:
    """Scored in pieces; each gets what it gets in a small request."""
    requests = Requests(
        offsets=np.array([0, 3]),
        item_ids=np.array([1, 2, 3]),
        timestamps=np.array([10, 20, 30]),
        actions=np.zeros(3, dtype=np.int64),
        candidate_offsets=np.array([0, 10**6]),
        candidate_ids=np.arange(10**6) % 40,
        times=np.array([40]),
    )
    scores = model.model.score(requests, 1 << 14)["scores"]
    few = Requests(**{**vars(requests), "candidate_offsets": np.array([0, 40]), "candidate_ids": np.arange(40)})
    assert np.allclose(scores.reshape(-1, 40), model.model.score(few, 1024)["scores"], rtol=0, atol=1e-5)
    assert all(math.isfinite(score) for score in scores[:40])
