"""The number of ranks and the sharding change nothing: losses, metrics, which users are evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hstu_dist.data.split import Split
from hstu_dist.distributed.process_group import process_group
from hstu_dist.train.state import TrainState
from tests.distributed.cases import LossHook, build, tiny_config, trainer_of
from tests.distributed.ranks import run_ranks
from tests.tiny import NUM_USERS

RUNS = {
    "row_wise": [],
    "table_wise": ["embedding=table_wise"],
    "data_parallel": ["embedding.sharding=data_parallel", "embedding.optimizer.kind=adamw"],
    "planner": ["embedding=planner"],
    "full_softmax": ["loss=full_softmax", "optimizer.clip_norm=0.5", "optimizer.schedule.kind=cosine"],
    "sasrec": ["model=sasrec", "optimizer.weight_decay=0.01"],
    # Adagrad and Adam do not see a gradient that is too large by the number of ranks; these do
    "adamw": ["embedding.optimizer.kind=adamw", "embedding.optimizer.weight_decay=0.1"],
    "rowwise_adamw": ["embedding=table_wise", "embedding.optimizer.kind=rowwise_adamw"],
    "scale": ["embedding.optimizer.kind=sgd", "embedding.optimizer.learning_rate=1.0", "optimizer.eps=1.0"],
    "reference": ["model.backend=reference"],
    "cut": ["data.stochastic_length={alpha: 1.2}", "trainer.batching.by=flops"],
}
# 60 users in batches of 19: the last batch of an epoch has 3, and so no share for the fourth rank
STEPS_PER_EPOCH = 4
EPOCHS = 10


def train_and_evaluate(data: Path, output: Path) -> dict[str, Any]:
    """Losses of each run; metrics and evaluated users after it."""
    found = {}
    with process_group("cpu", 60) as world:
        for name, overrides in RUNS.items():
            config = tiny_config(data, output, "trainer.global_batch_size=19", "model.width=8", *overrides)
            assert config.model.dropout == 0.2
            session = build(config, world)
            losses: list[float] = []
            epochs = EPOCHS if name == "row_wise" else 2
            trainer_of(session, TrainState(), epochs, [LossHook(losses)]).fit()
            users = [user for batch in session.loader(Split.TEST).epoch(0) for user in batch.row_ids.tolist()]
            found[name] = (losses, session.evaluate(Split.TEST), session.evaluate_popularity(Split.TEST), users)
    return found


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    output = tmp_path_factory.mktemp("runs")
    return {size: run_ranks(size, train_and_evaluate, tiny_data, output) for size in (1, 2, 3, 4)}


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", RUNS)
def test_losses_do_not_depend_on_the_number_of_ranks(runs: Any, name: str, world_size: int) -> None:
    single, _, _, _ = runs[1][0][name]
    losses, _, _, _ = runs[world_size][0][name]
    assert len(losses) == len(single) >= 2 * STEPS_PER_EPOCH
    # sums in another order; rounding grows along a trajectory
    assert losses == pytest.approx(single, rel=1e-5)
    if name == "row_wise":
        assert len(losses) == EPOCHS * STEPS_PER_EPOCH
        assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_losses_do_not_depend_on_the_sharding(runs: Any, world_size: int) -> None:
    table_wise, row_wise = (runs[world_size][0][name][0] for name in ("table_wise", "row_wise"))
    assert table_wise == pytest.approx(row_wise[: len(table_wise)], rel=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", RUNS)
def test_metrics_do_not_depend_on_the_number_of_ranks(runs: Any, name: str, world_size: int) -> None:
    _, single, popular, _ = runs[1][0][name]
    for rank in runs[world_size]:
        _, metrics, popularity, _ = rank[name]
        # counts are the same integers; sums of fractions differ in their last bit
        assert metrics == pytest.approx(single, rel=1e-12)
        assert popularity == pytest.approx(popular, rel=1e-12)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_user_is_evaluated_once(runs: Any, world_size: int) -> None:
    users = [user for rank in runs[world_size] for user in rank["row_wise"][3]]
    assert sorted(users) == list(range(NUM_USERS))


@pytest.mark.distributed
def test_training_beats_popularity(runs: Any) -> None:
    _, metrics, popularity, _ = runs[1][0]["row_wise"]
    assert metrics["hr@10"] > 1.5 * popularity["hr@10"]
