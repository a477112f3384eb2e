"""Ranks against a slow loop, metrics by hand, and sums that merge exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_dist.metrics import ranking
from hstu_dist.metrics.ranking import Measures, RankingMetrics, ranks_of_targets
from tests.ops.cases import offsets_of


def slow_rank(scores: list[float], target: int, history: list[int]) -> int:
    """1 + the items that come first: better score, or the same score and a smaller id."""
    others = [item for item in range(len(scores)) if item != target and item not in history]
    return 1 + sum((-scores[item], item) < (-scores[target], target) for item in others)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), users=st.integers(0, 6), items=st.integers(1, 12), rows_in_chunk=st.integers(1, 4))
def test_ranks_equal_a_slow_loop(data: st.DataObject, users: int, items: int, rows_in_chunk: int) -> None:
    # integers make scores exact and ties frequent
    vector = st.lists(st.integers(-2, 2), min_size=2, max_size=2)
    users_BD = data.draw(st.lists(vector, min_size=users, max_size=users))
    items_VD = data.draw(st.lists(vector, min_size=items, max_size=items))
    ids = st.integers(0, items - 1)
    targets = data.draw(st.lists(ids, min_size=users, max_size=users))
    # histories repeat items and hold the target now and then
    histories = data.draw(st.lists(st.lists(ids, max_size=8), min_size=users, max_size=users))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_CHUNK_ELEMENTS", rows_in_chunk * items)
        got = ranks_of_targets(
            torch.tensor(users_BD, dtype=torch.float32).view(users, 2),
            torch.tensor(items_VD, dtype=torch.float32),
            torch.tensor(targets, dtype=torch.int64),
            (
                torch.tensor([i for history in histories for i in history], dtype=torch.int64),
                offsets_of(tuple(map(len, histories))),
            ),
        )
    expected = [
        slow_rank([u[0] * v[0] + u[1] * v[1] for v in items_VD], target, history)
        for u, target, history in zip(users_BD, targets, histories, strict=True)
    ]
    assert got.dtype == torch.int64 and got.tolist() == expected


def ranks_of(scores: list[float], target: int, history: list[int]) -> int:
    seen = (torch.tensor(history), offsets_of((len(history),)))
    return int(ranks_of_targets(torch.ones(1, 1), torch.tensor(scores)[:, None], torch.tensor([target]), seen))


def test_ties_are_broken_by_id() -> None:
    assert [ranks_of([1.0, 1.0, 1.0, 2.0], target, [0]) for target in range(4)] == [2, 2, 3, 1]


def test_history_is_left_out_but_never_the_target() -> None:
    scores = [5.0, 4.0, 3.0, 2.0]
    assert ranks_of(scores, 3, [0]) == 3
    assert ranks_of(scores, 3, [0, 0, 2, 0]) == 2
    assert ranks_of(scores, 2, [2, 0, 2]) == 2


def test_scores_that_are_no_numbers_rank_last() -> None:
    """A model that diverged must not look perfect."""
    assert ranks_of([math.nan] * 4, 1, [0]) == 5
    assert ranks_of([1.0, math.nan, 3.0, 0.0], 1, [0]) == 5
    assert ranks_of([1.0, math.nan, 3.0, 0.0], 0, [2]) == 2


def test_metrics_by_hand() -> None:
    values = RankingMetrics.of_ranks(torch.tensor([1, 3, 11, 2]), Measures((1, 2, 10))).values()
    assert values == pytest.approx(
        {
            "hr@1": 1 / 4,
            "ndcg@1": 1 / 4,
            "hr@2": 2 / 4,
            "ndcg@2": (1 + 1 / math.log2(3)) / 4,
            "hr@10": 3 / 4,
            "ndcg@10": (1 + 1 / math.log2(3) + 1 / 2) / 4,
            "mrr": (1 + 1 / 3 + 1 / 11 + 1 / 2) / 4,
        },
        rel=1e-14,
    )


@settings(max_examples=50, deadline=None)
@given(ranks=st.lists(st.integers(1, 300), min_size=1, max_size=60), cut=st.integers(0, 60))
def test_parts_merge_to_the_whole(ranks: list[int], cut: int) -> None:
    cutoffs = Measures((1, 10, 50))
    whole = RankingMetrics.of_ranks(torch.tensor(ranks), cutoffs)
    merged = RankingMetrics.empty(cutoffs, torch.device("cpu"))
    for part in (ranks[:cut], ranks[cut:]):
        merged += RankingMetrics.of_ranks(torch.tensor(part, dtype=torch.int64), cutoffs)
    assert merged.num_users == whole.num_users == len(ranks)
    # users and hits are integers and add up exactly; sums of fractions differ in the last bits only
    assert torch.equal(merged.sums[[0, 1, 3, 5]], whole.sums[[0, 1, 3, 5]])
    assert torch.allclose(merged.sums, whole.sums, rtol=1e-14, atol=0)


def test_misuse_is_named() -> None:
    nothing = RankingMetrics.empty(Measures((10,)), torch.device("cpu"))
    with pytest.raises(ValueError, match="got no user"):
        nothing.values()
    with pytest.raises(ValueError, match=r"measures: got .*\(5,\).* expected .*\(10,\)"):
        nothing + RankingMetrics.empty(Measures((5,)), torch.device("cpu"))
