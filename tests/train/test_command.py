"""The train and evaluate commands on two ranks, from nothing to a result, and once more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hstu_dist.commands.evaluate import evaluate_run
from hstu_dist.commands.train import train
from hstu_dist.config import load
from hstu_dist.data.split import Split
from hstu_dist.train.metrics_log import read_metrics
from tests.distributed.cases import tiny_config
from tests.distributed.ranks import RanksFailedError, run_ranks


def train_tiny(data: Path, output: Path, *settings: str) -> list[str]:
    """What the command said on this rank."""
    said: list[str] = []
    train(tiny_config(data, output, *settings), said.append)
    return said


def evaluate_tiny(data: Path, output: Path, split: Split, *settings: str) -> list[str]:
    said: list[str] = []
    evaluate_run(tiny_config(data, output, *settings), split, said.append)
    return said


def test_a_run_ends_with_a_result_that_evaluation_confirms(tiny_data: Path, tmp_path: Path) -> None:
    settings = ["trainer.logging.tensorboard=true", "trainer.epochs=3", "trainer.logging.every_steps=4"]
    # too fast: an early epoch is the best, and only its checkpoint gives the result
    settings += ["optimizer.learning_rate=0.3", "trainer.checkpoint.keep=1"]
    said, silent = run_ranks(2, train_tiny, tiny_data, tmp_path, *settings)
    assert not silent
    run_dir = tmp_path / "tiny"
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["epochs"], result["steps"], result["world_size"]) == (3, 24, 2)
    assert load(run_dir / "config.yaml").name == "tiny"
    assert json.loads((run_dir / "environment.json").read_text())["versions"]["torch"]
    assert list((run_dir / "tensorboard").iterdir())

    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines if "train/loss" in line] == [4, 8, 12, 16, 20, 24]
    validated = {line["step"]: line["validation/ndcg@10"] for line in lines if "validation/ndcg@10" in line}
    assert list(validated) == [8, 16, 24]
    best = max(validated.values())
    assert result["best_epoch"] < 3
    assert result["validation"] == {"ndcg@10": best} and validated[8 * result["best_epoch"]] == best

    assert any(f"{result['test']['hr@10']:.4f}" in line for line in said)
    said, _ = run_ranks(2, train_tiny, tiny_data, tmp_path, *settings)
    assert any("already finished at epoch 3, step 24" in line for line in said)
    # evaluation needs not the ranks that trained
    (said,) = run_ranks(1, evaluate_tiny, tiny_data, tmp_path, Split.TEST, *settings)
    for metric, value in result["test"].items():
        assert f"{metric:>10} {value:.4f}" in said
    said, silent, _ = run_ranks(3, evaluate_tiny, tiny_data, tmp_path, Split.VALIDATION, *settings)
    assert f"{'ndcg@10':>10} {best:.4f}" in said and not silent


def test_a_run_goes_on_with_more_epochs(tiny_data: Path, tmp_path: Path) -> None:
    (first,) = run_ranks(1, train_tiny, tiny_data, tmp_path, "trainer.epochs=1")
    (second,) = run_ranks(1, train_tiny, tiny_data, tmp_path, "trainer.epochs=2")
    assert any("continuing at epoch 1, step 8" in line for line in second) and first != second
    assert json.loads((tmp_path / "tiny" / "result.json").read_text())["steps"] == 16


def test_evaluation_needs_a_run(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match=r"UserError: run .*tiny: got no checkpoint -> train it first"):
        run_ranks(1, evaluate_tiny, tiny_data, tmp_path, Split.TEST)
