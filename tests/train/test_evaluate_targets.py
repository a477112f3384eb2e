"""Every target of held-out records counts: against a plain loop over positions and items."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from hstu_dist.batch import JaggedBatch
from hstu_dist.metrics.ranking import Measures
from hstu_dist.train.evaluate_targets import CountedTargets, evaluate_target_popularity, evaluate_targets

OFFSETS = [0, 4, 5, 5, 11]
V, D = 13, 3


class Model:
    """What evaluation asks of a recommender; vectors are looked up by position."""

    def __init__(self, vectors: torch.Tensor, items: torch.Tensor) -> None:
        self.vectors, self.items = vectors, items

    def corpus(self) -> torch.Tensor:
        return self.items

    def encode_local(self, items_TD: torch.Tensor, batch: JaggedBatch) -> torch.Tensor:
        return self.vectors


def batch() -> JaggedBatch:
    T = OFFSETS[-1]
    ids = torch.arange(T) * 5 % V
    return JaggedBatch(
        offsets=torch.tensor(OFFSETS),
        item_ids=ids,
        timestamps=torch.zeros(T, dtype=torch.int64),
        actions=torch.zeros(T, dtype=torch.int32),
        target_ids=(ids * 3 + 1) % V,
        query_times=torch.zeros(T, dtype=torch.int64),
        row_ids=torch.arange(4),
    )


def plain(scores: torch.Tensor, ranked: torch.Tensor, target: int) -> tuple[float, float]:
    """Nats, and rank with ties by id."""
    better = sum(float(s) > float(ranked[target]) for s in ranked)
    ties = sum(float(ranked[i]) == float(ranked[target]) for i in range(target))
    return math.log(sum(math.exp(float(s)) for s in scores)) - float(scores[target]), 1 + better + ties


@pytest.mark.parametrize("last", [None, 1, 2])
def test_ranks_and_nats_are_those_of_a_plain_loop(last: int | None) -> None:
    found_batch = batch()
    vectors = torch.nn.functional.normalize(torch.randn(OFFSETS[-1], D), dim=1)
    items = torch.randn(V, D)
    found = evaluate_targets(Model(vectors, items), [found_batch], CountedTargets(Measures((2, 5)), 0.1, last))  # type: ignore[arg-type]
    unit = torch.nn.functional.normalize(items, dim=1)
    rows = [t for start, end in pairwise(OFFSETS) for t in range(start, end) if last is None or end - t <= last]
    plainly = [plain(unit @ vectors[t] / 0.1, unit @ vectors[t], int(found_batch.target_ids[t])) for t in rows]
    assert found["loss"] == pytest.approx(sum(nats for nats, _ in plainly) / len(rows), rel=1e-4)
    for k in (2, 5):
        assert found[f"hr@{k}"] == pytest.approx(sum(rank <= k for _, rank in plainly) / len(rows))


def test_popularity_predicts_in_proportion() -> None:
    counts = torch.arange(V) % 4
    found = evaluate_target_popularity(counts, [batch()], CountedTargets(Measures((3,)), 1.0))
    share = (counts + 1) / (counts + 1).sum()
    assert found["loss"] == pytest.approx(-float(share[batch().target_ids].log().mean()), rel=1e-6)
