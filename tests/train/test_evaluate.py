"""Evaluation equals ranking each user alone: encode the history, compare by cosine, leave seen items out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hstu_dist.batch import JaggedBatch
from hstu_dist.data.split import Split
from hstu_dist.metrics.ranking import Measures, RankingMetrics
from tests.distributed.cases import build, tiny_config
from tests.tiny import NUM_ITEMS, NUM_USERS
from tests.train.cases import WORLD


@pytest.mark.slow
@pytest.mark.parametrize("split", [Split.VALIDATION, Split.TEST])
def test_equals_ranking_each_user_alone(split: Split, tiny_data: Path) -> None:
    session = build(tiny_config(tiny_data, Path("unused"), "trainer.evaluation.batch_size=7"), WORLD)
    data = session.dataset
    # lengths of the rows differ by far, as they do after training: cosine is not the inner product
    (weight,) = session.recommender.tables.weights().values()
    weight.mul_(torch.logspace(-2, 2, NUM_ITEMS)[:, None])
    corpus = session.recommender.corpus()
    ranks = []
    for user in range(data.num_sequences):
        events = data.item_ids[data.offsets[user] : data.offsets[user + 1]].tolist()
        times = torch.from_numpy(data.timestamps[data.offsets[user] : data.offsets[user + 1]].copy())
        if split is Split.VALIDATION:
            events, times = events[:-1], times[:-1]
        *history, target = events[-17:]
        alone = JaggedBatch(
            offsets=torch.tensor([0, len(history)]),
            item_ids=torch.tensor(history),
            timestamps=times[-17:][:-1].clone(),
            actions=torch.zeros(len(history), dtype=torch.int32),
            target_ids=torch.tensor(events[-16:][-len(history) :]),
            query_times=times[-len(history) :].clone(),
            row_ids=torch.tensor([user]),
        )
        vector = session.recommender.encode_local(corpus[alone.item_ids], alone)[-1]
        scores = torch.nn.functional.cosine_similarity(corpus.double(), vector.double()[None], dim=1)
        scores[list(set(history) - {target})] = -2.0
        ranks.append(1 + int((scores > scores[target]).sum()))
    assert len(ranks) == NUM_USERS
    cutoffs = Measures(session.config.trainer.evaluation.cutoffs)
    expected = RankingMetrics.of_ranks(torch.tensor(ranks), cutoffs).values()
    assert session.evaluate(split) == pytest.approx(expected, rel=1e-12)


def test_popularity_ranks_by_training_counts(tiny_data: Path) -> None:
    session = build(tiny_config(tiny_data, Path("unused")), WORLD)
    data = session.dataset
    users = [data.item_ids[data.offsets[u] : data.offsets[u + 1]].tolist() for u in range(data.num_sequences)]
    counts = [sum(events[:-2].count(item) for events in users) for item in range(NUM_ITEMS)]
    ranks = []
    for events in users:
        *history, target = events[-17:]
        others = set(range(NUM_ITEMS)) - set(history) - {target}
        ranks.append(1 + sum((-counts[item], item) < (-counts[target], target) for item in others))
    expected = RankingMetrics.of_ranks(
        torch.tensor(ranks), Measures(session.config.trainer.evaluation.cutoffs)
    ).values()
    assert session.evaluate_popularity(Split.TEST) == pytest.approx(expected, rel=1e-12)


def test_a_split_by_time_ranks_the_first_event_after_the_moment(tiny_data: Path) -> None:
    settings = ("task.split=time", "task.validation_share=0.2", "task.test_share=0.2")
    session = build(tiny_config(tiny_data, Path("unused"), *settings), WORLD)
    data, moments = session.dataset, session.moments
    assert moments is not None
    expected = {}
    for user in range(data.num_sequences):
        times = data.timestamps[data.offsets[user] : data.offsets[user + 1]]
        history = int((times <= moments.validate_until).sum())
        if 0 < history < len(times):
            expected[user] = int(data.item_ids[data.offsets[user] + history])
    batches = list(session.loader(Split.TEST).epoch(0))
    lasts = [
        (int(row), int(b.target_ids[end - 1]))
        for b in batches
        for row, end in zip(b.row_ids, b.offsets[1:], strict=True)
    ]
    assert dict(lasts) == expected
    assert 0 < len(expected) < NUM_USERS
    assert 0 < session.evaluate(Split.TEST)["mrr"] <= 1
