"""Ranking runs: the number of ranks changes neither losses nor metrics, and a whole run learns and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hstu_dist.commands.ranking_session import RankingSession
from hstu_dist.commands.train import train
from hstu_dist.config import compose
from hstu_dist.data.split import Split
from hstu_dist.distributed.process_group import process_group
from hstu_dist.run_folder import RunFolder
from hstu_dist.train.state import TrainState
from tests.distributed.cases import LossHook, build, trainer_of
from tests.distributed.ranks import run_ranks
from tests.rated import rated_overrides

pytestmark = pytest.mark.distributed

RUNS = {
    "hstu": ("hstu", []),
    "parts": ("hstu", ["trainer.micro_batches=2", "model.concat_ux=true"]),
    "dlrm": ("dlrm", []),
    "cross": ("dlrm", ["model.interaction=cross", "model.cross_rank=4"]),
}
EPOCHS = 2


def train_and_evaluate(data: Path, output: Path) -> dict[str, Any]:
    found = {}
    with process_group("cpu", 60) as world:
        for name, (model, overrides) in RUNS.items():
            config = compose([*rated_overrides(data, output, model), "trainer.global_batch_size=9", *overrides])
            session = build(config, world)
            assert isinstance(session, RankingSession)
            losses: list[float] = []
            trainer = trainer_of(session, TrainState(), EPOCHS, [LossHook(losses)])
            trainer.fit()
            found[name] = (losses, session.evaluate(Split.TEST), session.evaluate_popularity(Split.TEST))
    return found


@pytest.fixture(scope="module")
def runs(rated_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    output = tmp_path_factory.mktemp("runs")
    return {size: run_ranks(size, train_and_evaluate, rated_data, output) for size in (1, 2, 3)}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_losses_and_metrics_do_not_depend_on_the_number_of_ranks(runs: Any, name: str, world_size: int) -> None:
    losses, metrics, averages = runs[1][0][name]
    for rank in runs[world_size]:
        # sums in another order; rounding grows along a trajectory
        assert rank[name][0] == pytest.approx(losses, rel=1e-5)
        assert rank[name][1] == pytest.approx(metrics, rel=1e-4)
        # the same numbers on every rank: areas are counted, sums differ in their last bit
        assert rank[name][2] == pytest.approx(averages, rel=1e-12)
        assert rank[name][2]["like/auc"] == averages["like/auc"]


def test_metrics_have_the_names_of_their_heads(runs: Any) -> None:
    _, metrics, averages = runs[1][0]["hstu"]
    binary, regression = ("ne", "auc", "log_loss", "gauc"), ("mse", "mae", "r2")
    assert list(metrics) == list(averages)
    assert list(metrics) == [f"like/{m}" for m in binary] + [f"stars/{m}" for m in regression]


@pytest.mark.parametrize("model", ["hstu", "dlrm"])
def test_a_run_learns_is_tested_once_and_is_not_repeated(model: str, rated_data: Path, tmp_path: Path) -> None:
    overrides = [
        *rated_overrides(rated_data, tmp_path, model),
        "trainer.epochs=12",
        "model.dropout=0",
        "optimizer.learning_rate=0.01",
        "embedding.optimizer.kind=adamw",
        "embedding.optimizer.learning_rate=0.01",
    ]
    config, said = compose(overrides), list[str]()
    train(config, said.append)
    result = RunFolder(config.run_dir).result()
    assert result is not None and set(result["validation"]) == {"like/auc"}
    assert result["test"]["like/auc"] > 0.6 and result["test"]["like/ne"] < 1.1
    assert any("item averages" in line and "like/gauc" in line for line in said)
    train(config, said.append)
    assert "already finished" in said[-1]
    assert RunFolder(config.run_dir).result() == result
