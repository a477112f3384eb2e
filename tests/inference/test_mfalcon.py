"""M-FALCON gives each candidate what it would get alone, whatever is divided, cached or repeated."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hstu_dist.inference.batches import Candidates, History, MicroBatch
from hstu_dist.inference.cache import StateCache
from hstu_dist.inference.mfalcon import Encoded, Scorer
from hstu_dist.models.config import HSTUConfig, TransformerConfig
from hstu_dist.ops import backends
from hstu_dist.ops.spec import Backend
from tests.inference.cases import MAX_LENGTH, NUM_ITEMS, VARIANTS, candidates_of, encoder_of, history_of, one_by_one

BACKENDS = [Backend.REFERENCE, *(b for b in backends.available(torch.device("cpu")) if b is not Backend.REFERENCE)]
LENGTHS, COUNTS = (0, 1, 63, 7, 71, 5, 0), (3, 5, 7, 0, 19, 1, 0)
TOLERANCE = 1e-5


def assert_equal(got: Encoded, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    for ours, theirs in zip((got.candidates, got.last), expected, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE), float((ours - theirs).abs().max())


def assert_same_as_alone(
    config: HSTUConfig | TransformerConfig, lengths: tuple[int, ...], counts: tuple[int, ...]
) -> None:
    encoder = encoder_of(config)
    history = history_of(lengths)
    candidates = candidates_of(counts, history)
    expected = one_by_one(encoder, history, candidates)
    assert float(expected[0].std(0).min()) > 1e-2
    for micro_batch in (None, MicroBatch(candidates=6, tokens=70), MicroBatch(candidates=1, tokens=1)):
        assert_equal(Scorer(encoder).score(history, candidates, micro_batch), expected)
    cache = StateCache(1 << 24)
    scorer = Scorer(encoder)
    for micro_batch in (MicroBatch(candidates=6, tokens=70), None):
        assert_equal(scorer.score(history, candidates, micro_batch, cache), expected)
        # a user whose history is empty has nothing to keep
        assert len(cache) == sum(length > 0 for length in lengths)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_scoring_each_candidate_alone(name: str, backend: Backend) -> None:
    assert_same_as_alone(replace(VARIANTS[name], backend=backend.value), LENGTHS, COUNTS)


_INTERPRETED = """
from dataclasses import replace
from tests.inference.test_mfalcon import VARIANTS, assert_same_as_alone
assert_same_as_alone(replace(VARIANTS["paper"], backend="triton", num_layers=2), (0, 1, 18), (2, 3, 4))
"""


@pytest.mark.slow
def test_equals_scoring_alone_in_triton() -> None:
    # Triton decides between compiling and interpreting when it is imported
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", _INTERPRETED]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_contextual_tokens_stay_together() -> None:
    encoder = encoder_of(VARIANTS["paper"])
    history = history_of((9, 4, 2, 0), contextual=(3, 4, 0, 0))
    candidates = candidates_of((4, 2, 3, 2), history)
    cache, scorer = StateCache(1 << 24), Scorer(encoder)
    assert_equal(scorer.score(history, candidates, cache=cache), one_by_one(encoder, history, candidates))
    # one contextual token differs: the others saw it
    tokens = history.tokens.clone()
    tokens[2] = (tokens[2] + 1) % NUM_ITEMS
    changed = replace(history, tokens=tokens)
    assert_equal(scorer.score(changed, candidates, cache=cache), one_by_one(encoder, changed, candidates))


def test_more_contextual_tokens_are_another_history() -> None:
    encoder = encoder_of(VARIANTS["paper"])
    cache, scorer = StateCache(1 << 24), Scorer(encoder)
    for contextual in (None, (3, 4), (2, 4)):
        history = history_of((9, 4), contextual=contextual)
        candidates = candidates_of((4, 2), history)
        assert_equal(scorer.score(history, candidates, cache=cache), one_by_one(encoder, history, candidates))
    assert (cache.statistics.hits, cache.statistics.misses) == (1, 5)


def test_only_new_tokens_are_computed() -> None:
    encoder = encoder_of(VARIANTS["paper"])
    computed: list[int] = []

    def counting(vectors: torch.Tensor, context: object) -> torch.Tensor:
        computed.append(vectors.shape[0])
        return encoder.encode(vectors, context)  # type: ignore[arg-type]

    scorer, cache = Scorer(replace(encoder, encode=counting)), StateCache(1 << 24)
    whole = history_of((60,))

    def request(length: int, time: int | None = None, counts: int = 4) -> None:
        """The first events of a history, asked about at the time of the next one or at another time."""
        query_times = whole.query_times[:length].clone()
        if time is not None and length:
            query_times[-1] = time
        history = History(
            offsets=torch.tensor([0, length]),
            tokens=whole.tokens[:length],
            key_times=whole.key_times[:length],
            query_times=query_times,
            users=["u"],
        )
        candidates = candidates_of((counts,), history)
        computed.clear()
        got = scorer.score(history, candidates, MicroBatch(candidates=3), cache)
        made = list(computed)
        assert_equal(got, one_by_one(encoder, history, candidates))
        computed[:] = made

    request(40)
    assert computed == [40 + 3, 1]
    request(40)
    assert computed == [3, 1]
    # three more events
    request(43)
    assert computed == [3 + 3, 1]
    # the same ones a year later: only the last token knows when the request is made
    request(43, time=4 * 10**9)
    assert computed == [1 + 3, 1]
    # a shorter history, of which the end is no longer there
    request(20, counts=1)
    assert computed == [1 + 1]
    request(60, counts=0)
    assert computed == [40]
    request(60, counts=0)
    assert computed == []


def test_changed_weights_and_other_scorers_find_nothing() -> None:
    encoder, cache = encoder_of(VARIANTS["paper"]), StateCache(1 << 24)
    history = history_of((20, 5))
    candidates = candidates_of((3, 3), history)
    scorer = Scorer(encoder)
    before = scorer.score(history, candidates, cache=cache)
    optimizer = torch.optim.SGD([w for w in encoder.weights if w.requires_grad], lr=0.5)
    for weight in encoder.weights:
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    optimizer.step()
    after = scorer.score(history, candidates, cache=cache)
    assert not torch.allclose(before.candidates, after.candidates, atol=1e-3)
    assert_equal(after, one_by_one(encoder, history, candidates))
    # rows of the item table, changed in place
    with torch.no_grad():
        encoder.weights[0].mul_(-1)
    assert_equal(scorer.score(history, candidates, cache=cache), one_by_one(encoder, history, candidates))
    other = encoder_of(VARIANTS["paper"], seed=2)
    assert_equal(Scorer(other).score(history, candidates, cache=cache), one_by_one(other, history, candidates))


def test_cache_is_bounded_and_forgets_the_least_recently_used() -> None:
    encoder = encoder_of(VARIANTS["paper"])
    scorer, history = Scorer(encoder), history_of((30, 30, 30, 30))
    candidates = candidates_of((2, 2, 2, 2), history)
    probe = StateCache(1 << 24)
    scorer.score(history, candidates, cache=probe)
    # keys and values of 3 layers, width 12, and 3 numbers that tell each token
    assert probe.num_bytes == 4 * (30 * (3 * 2 * 12 * 4 + 3 * 8) + 12 * 4)
    size = probe.num_bytes // 4
    cache = StateCache(2 * size + 1)
    assert_equal(scorer.score(history, candidates, cache=cache), one_by_one(encoder, history, candidates))
    assert (len(cache), cache.num_bytes, cache.statistics.evictions) == (2, 2 * size, 2)
    version = scorer.version()
    assert cache.get("user-0", version) is None and cache.get("user-2", version) is not None
    # user-3 is now the older one
    scorer.score(history_of((30,)), candidates_of((1,), history_of((30,))), cache=cache)
    assert cache.get("user-3", version) is None and cache.get("user-2", version) is not None
    nothing = StateCache(0)
    assert_equal(scorer.score(history, candidates, cache=nothing), one_by_one(encoder, history, candidates))
    assert len(nothing) == 0
    with pytest.raises(ValueError, match="max_bytes: got -1"):
        StateCache(-1)


def test_nobody_and_nothing() -> None:
    encoder = encoder_of(VARIANTS["paper"])
    nobody = history_of(())
    got = Scorer(encoder).score(nobody, candidates_of((), nobody), cache=StateCache(1 << 20))
    assert got.candidates.shape == (0, 12) and got.last.shape == (0, 12)
    quiet = history_of((0, 0))
    got = Scorer(encoder).score(quiet, candidates_of((0, 0), quiet), cache=StateCache(1 << 20))
    assert got.candidates.shape == (0, 12) and torch.equal(got.last, torch.zeros(2, 12))


def test_twice_the_same_user_in_one_call() -> None:
    encoder = encoder_of(VARIANTS["paper"])
    history = replace(history_of((30, 12, 30)), users=["u", "u", "v"])
    candidates = candidates_of((9, 9, 9), history)
    cache = StateCache(1 << 24)
    for micro_batch in (None, MicroBatch(candidates=4)):
        got = Scorer(encoder).score(history, candidates, micro_batch, cache)
        assert_equal(got, one_by_one(encoder, history, candidates))


def test_memory_does_not_grow_with_candidates() -> None:
    """A pass never holds more rows than history and micro-batch."""
    encoder = encoder_of(VARIANTS["paper"])
    rows: list[tuple[int, int]] = []

    def watching(vectors: torch.Tensor, context: object) -> torch.Tensor:
        layout = context.layout  # type: ignore[attr-defined]
        rows.append((layout.total, layout.key_total))
        return encoder.encode(vectors, context)  # type: ignore[arg-type]

    history = history_of((50, 3, 40, 71))
    candidates = candidates_of((1000, 2, 300, 10), history)
    Scorer(replace(encoder, encode=watching)).score(history, candidates, MicroBatch(candidates=64, tokens=100))
    assert max(new for new, _ in rows) <= 100 + 64 and max(keys for _, keys in rows) <= 100 + 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, c: (history_of((MAX_LENGTH,)), c), r"got 72 tokens of user 0, expected at most 71"),
        (lambda h, c: (history_of((1, 2)), c), r"candidates: got 1 users, expected 2"),
        (lambda h, c: (h, replace(c, tokens=c.tokens.repeat(1, 2))), r"got 2 numbers a token, expected 1"),
        (lambda h, c: (replace(h, tokens=h.tokens.to(torch.int32)), c), r"history.tokens: got torch.int32"),
        (lambda h, c: (replace(h, key_times=h.key_times[1:]), c), r"history.key_times: .*expected torch.int64 \[5\]"),
        (lambda h, c: (replace(h, offsets=h.offsets + 1), c), r"history.offsets: got \[1, 6\]"),
        (lambda h, c: (replace(h, offsets=torch.tensor([0, 9, 5])), c), r"history.offsets: got \[0, 9, 5\]"),
        (lambda h, c: (replace(h, offsets=h.offsets.float()), c), r"history.offsets: got torch.float32"),
        (lambda h, c: (replace(h, users=[]), c), r"history.users: got 0, expected 1"),
        (lambda h, c: (replace(h, num_contextual=torch.tensor([6])), c), r"num_contextual: got more"),
        (lambda h, c: (h, replace(c, times=c.times.float())), r"candidates.times: got torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(change: object, message: str) -> None:
    history = history_of((5,))
    candidates: Candidates = candidates_of((2,), history)
    with pytest.raises(ValueError, match=message):
        Scorer(encoder_of(VARIANTS["paper"])).score(*change(history, candidates))  # type: ignore[operator]


def test_history_may_fill_all_positions_where_nothing_is_appended() -> None:
    encoder = encoder_of(HSTUConfig(width=12, num_heads=2, max_length=MAX_LENGTH))
    history = history_of((MAX_LENGTH,))
    candidates = candidates_of((0,), history)
    assert_equal(Scorer(encoder).score(history, candidates), one_by_one(encoder, history, candidates))
    with pytest.raises(ValueError, match="expected >= 1"):
        MicroBatch(candidates=0)
