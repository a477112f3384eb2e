"""The train and evaluate commands on two ranks, from nothing to a result, and once more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hstu_dist.checkpoint.manifest import read_manifest
from hstu_dist.commands.evaluate import evaluate_run
from hstu_dist.commands.train import train
from hstu_dist.config import load
from hstu_dist.data.split import Split
from hstu_dist.report.flame import read_trace
from hstu_dist.train.metrics_file import read_metrics
from tests.distributed.cases import tiny_config
from tests.distributed.ranks import RanksFailedError, run_ranks
from tests.tiny import NUM_ITEMS, result_of


def train_tiny(data: Path, output: Path, *settings: str) -> list[str]:
    """What the command said on this rank."""
    said: list[str] = []
    train(tiny_config(data, output, *settings), said.append)
    return said


def evaluate_tiny(data: Path, output: Path, split: Split, *settings: str) -> list[str]:
    said: list[str] = []
    evaluate_run(tiny_config(data, output, *settings), split, said.append)
    return said


@pytest.mark.distributed
def test_a_run_ends_with_a_result_that_evaluation_confirms(tiny_data: Path, tmp_path: Path) -> None:
    settings = ["trainer.logging.tensorboard=true", "trainer.epochs=3", "trainer.logging.every_steps=4"]
    # a decay that grows until it undoes what was learnt: the first epoch is the best by far, at any seed
    settings += ["optimizer.learning_rate=0.1", "optimizer.weight_decay=100", "optimizer.schedule.warmup_steps=24"]
    # and only its checkpoint gives the result
    settings += ["embedding.optimizer.learning_rate=3", "trainer.checkpoint.keep=1"]
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
    assert result["best_epoch"] == 1
    assert result["validation"] == {"ndcg@10": best} and validated[8 * result["best_epoch"]] == best

    speed = result["speed"]
    logged = [line for line in lines if "speed/mfu" in line]
    # the mean over the run lies between those over its parts; checkpoints count too
    assert 0 < speed["mfu"] <= max(line["speed/mfu"] for line in logged) and len(logged) == 6
    assert 0 < speed["tokens_per_second"] <= max(line["speed/tokens_per_second"] for line in logged)
    assert all(0 <= line[name] < 1 for line in logged for name in ("speed/imbalance", "speed/imbalance_in_turns"))
    assert speed["train_seconds"] > 0 and speed["evaluation_seconds"] > 0

    assert any(f"{result['test']['hr@10']:.4f}" in line for line in said)
    said, _ = run_ranks(2, train_tiny, tiny_data, tmp_path, *settings)
    assert any("already finished at epoch 3, step 24" in line for line in said)
    # evaluation needs not the ranks that trained
    (said,) = run_ranks(1, evaluate_tiny, tiny_data, tmp_path, Split.TEST, *settings)
    for metric, value in result["test"].items():
        assert [metric, f"{value:.4f}"] in [line.split() for line in said]
    said, silent, _ = run_ranks(3, evaluate_tiny, tiny_data, tmp_path, Split.VALIDATION, *settings)
    assert ["ndcg@10", f"{best:.4f}"] in [line.split() for line in said] and not silent

    # without the best epoch's checkpoint, which a full disk may have refused, the newest is tested and named
    shutil.rmtree(run_dir / "checkpoints" / "step-00000008")
    (run_dir / "result.json").unlink()
    run_ranks(2, train_tiny, tiny_data, tmp_path, *settings)
    newest = json.loads((run_dir / "result.json").read_text())
    assert newest["best_epoch"] == 3 and newest["validation"] == {"ndcg@10": validated[24]}
    assert newest["test"] != result["test"]


@pytest.mark.distributed
def test_a_run_goes_on_with_more_epochs(tiny_data: Path, tmp_path: Path) -> None:
    (first,) = run_ranks(1, train_tiny, tiny_data, tmp_path, "trainer.epochs=1")
    record = tmp_path / "tiny" / "data.json"
    # as a version before the record would have left it
    record.unlink()
    plan = tmp_path / "tiny" / "embedding_plan.json"
    assert any("embedding tables on 1 ranks" in line and "row_wise" in line for line in first)
    # by the plan that it has made, as another run would be
    (second,) = run_ranks(1, train_tiny, tiny_data, tmp_path, "trainer.epochs=2", f"embedding.plan={plan}")
    described = read_manifest(tmp_path / "tiny" / "checkpoints" / "step-00000016").state["tables"]["item"]
    assert (described["rows"], described["width"], described["dtype"]) == (NUM_ITEMS, 8, "fp32")
    assert described["optimizer"]["kind"] == "rowwise_adagrad" and described["optimizer"]["learning_rate"] == 0.05
    assert any("continuing at epoch 1, step 8" in line for line in second) and first != second
    assert json.loads((tmp_path / "tiny" / "result.json").read_text())["steps"] == 16
    assert not record.exists()


@pytest.mark.distributed
def test_a_refit_repeats_the_chosen_epochs_on_all_but_the_test_events(tiny_data: Path, tmp_path: Path) -> None:
    """Stopped by its user and continued, it ends as if left alone; it never sees the validation events as a target."""
    refit = ["trainer.train_on=train_validation", "trainer.epochs=3", "trainer.stop_epoch=2"]
    # a schedule and two ranks: both must continue as they were
    refit += ["optimizer.schedule.kind=linear", "trainer.evaluation.track_test=true"]
    said, _ = run_ranks(2, train_tiny, tiny_data, tmp_path / "whole", *refit)
    whole = result_of(tmp_path / "whole" / "tiny")
    assert (whole["train_on"], whole["epochs"], whole["steps"]) == ("train_validation", 2, 16)
    assert "best_epoch" not in whole and "validation" not in whole
    assert any("test after 2 epochs on the training and validation events" in line for line in said)
    lines = read_metrics(tmp_path / "whole" / "tiny")
    assert not [line for line in lines if "validation/ndcg@10" in line]
    tracked = {line["step"] // 8: line for line in lines if "reference_protocol/test/hr@10" in line}
    best = max(tracked, key=lambda epoch: (tracked[epoch]["reference_protocol/test/ndcg@10"], -epoch))
    assert list(tracked) == [1, 2] and whole["reference_protocol"]["best_epoch"] == best
    # the test metrics are those of the last epoch, best or not
    assert all(tracked[2][f"reference_protocol/test/{name}"] == value for name, value in whole["test"].items())

    run_ranks(2, train_tiny, tiny_data, tmp_path / "parts", *refit, "trainer.stop_epoch=1")
    (tmp_path / "parts" / "tiny" / "result.json").unlink()
    run_ranks(2, train_tiny, tiny_data, tmp_path / "parts", *refit)
    assert result_of(tmp_path / "parts" / "tiny") == whole
    said, _ = run_ranks(2, train_tiny, tiny_data, tmp_path / "parts", *refit)
    assert any("already finished at epoch 2, step 16" in line for line in said)

    (said,) = run_ranks(1, evaluate_tiny, tiny_data, tmp_path / "whole", Split.TEST, *refit)
    assert ["hr@10", f"{whole['test']['hr@10']:.4f}"] in [line.split() for line in said]
    with pytest.raises(RanksFailedError, match="was trained on the validation events -> evaluate it with --split test"):
        run_ranks(1, evaluate_tiny, tiny_data, tmp_path / "whole", Split.VALIDATION, *refit)


@pytest.mark.distributed
def test_tracking_the_test_split_changes_nothing_else(tiny_data: Path, tmp_path: Path) -> None:
    run_ranks(1, train_tiny, tiny_data, tmp_path / "plain")
    (said,) = run_ranks(1, train_tiny, tiny_data, tmp_path / "tracked", "trainer.evaluation.track_test=true")
    plain, tracked = (result_of(tmp_path / name / "tiny") for name in ("plain", "tracked"))
    reference = tracked.pop("reference_protocol")
    assert tracked == plain
    shown = f"best test epoch ({reference['best_epoch']})*"
    assert shown in said[-1] and "* for comparison with published tables only" in said[-1]
    assert f"{reference['test']['ndcg@10']:.4f}" in said[-1]


@pytest.mark.distributed
def test_evaluation_needs_a_run(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match=r"UserError: run .*tiny: got no checkpoint -> train it first"):
        run_ranks(1, evaluate_tiny, tiny_data, tmp_path, Split.TEST)


@pytest.mark.distributed
def test_a_profiled_run_draws_its_steps(tiny_data: Path, tmp_path: Path) -> None:
    profiled = ["trainer.profile.first_step=1", "trainer.profile.num_steps=2", "trainer.profile.memory=true"]
    run_ranks(1, train_tiny, tiny_data, tmp_path, "trainer.epochs=1", *profiled)
    parts = read_trace(tmp_path / "tiny" / "trace.json").children
    assert {"draw", "look up", "encode", "loss", "backward", "update"} <= set(parts)
    assert {path.name for path in (tmp_path / "tiny").glob("step.*")} == {"step.png", "step.svg"}
    assert json.loads((tmp_path / "tiny" / "memory.json").read_text())
