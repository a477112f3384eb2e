"""Refused steps are counted and kept; too many in a row end the run, and a replay says what was wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hstu_dist.batch import JaggedBatch
from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.commands.replay import replay
from hstu_dist.config import save
from hstu_dist.data.split import Split
from hstu_dist.distributed.process_group import process_group
from hstu_dist.errors import UserError
from hstu_dist.models.flops import Workload
from hstu_dist.run_folder import RunFolder
from hstu_dist.train.config import GuardConfig
from hstu_dist.train.guard import GuardHook, RefusedStep, read_refused, write_refused
from hstu_dist.train.state import TrainState
from hstu_dist.train.step import Refusal, StepResult
from hstu_dist.train.trainer import Trainer
from tests.distributed.cases import build, tiny_config
from tests.distributed.ranks import run_ranks
from tests.train.cases import BATCHES, idle_trainer


def guarded(folder: Path, refused: set[int], max_refused: int = 3) -> tuple[Trainer, list[TrainState]]:
    """A trainer whose steps of these numbers are refused, and the states that were saved because of it."""
    saved: list[TrainState] = []

    def step(batch: JaggedBatch, work: Workload, position: tuple[int, int]) -> StepResult:
        if position[0] not in refused:
            return StepResult(1.0, work, 0.5)
        return StepResult(0.0, Workload(), 0.5, 0.0, Refusal(batch, work, "it is wrong"))

    hook = GuardHook(GuardConfig(max_refused=max_refused), folder, lambda trainer: saved.append(trainer.state))
    return idle_trainer([hook], step=step), saved


def test_single_refusals_are_counted_and_kept(tmp_path: Path) -> None:
    trainer, saved = guarded(tmp_path, {0, 2, 3, 5})
    trainer.fit()
    assert trainer.state.step == 2 * BATCHES and trainer.state.refused_steps == 4 and not saved
    kept = {path.parent.name: read_refused(path) for path in tmp_path.rglob("rank-0.pt")}
    assert sorted(kept) == [f"step-0000000{step}" for step in (0, 2, 3, 5)]
    batches = [batch for epoch in range(2) for batch in trainer.loader.epoch(epoch)]
    for refused in kept.values():
        expected = batches[refused.step]
        assert torch.equal(refused.refusal.batch.item_ids, expected.item_ids)
        assert torch.equal(refused.refusal.batch.row_ids, expected.row_ids)
        assert refused.refusal.work == Workload.causal(expected.lengths.tolist())
    # what was not trained on is not counted
    trained = [n for step, batch in enumerate(batches) if step not in (0, 2, 3, 5) for n in batch.lengths.tolist()]
    assert trainer.state.tokens == sum(trained)


def test_too_many_in_a_row_save_and_end_the_run(tmp_path: Path) -> None:
    trainer, saved = guarded(tmp_path, {1, 3, 4, 5}, max_refused=3)
    with pytest.raises(UserError, match="step 5: it is wrong, 3 steps in a row") as caught:
        trainer.fit()
    assert f"python -m hstu_dist replay {tmp_path}/step-00000005" in caught.value.remedy
    assert [(state.step, state.refused_steps) for state in saved] == [(6, 4)]


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "replay"
    blocked.write_text("a file in the place of the folder")
    trainer, _ = guarded(blocked, {1})
    trainer.fit()
    assert trainer.state.refused_steps == 1 and "the batch of step 1 cannot be kept" in caplog.text


def replayed(data: Path, output: Path, poisoned: bool) -> list[str]:
    """On a rank: what a replay says of the first batch; a weight of the checkpoint may be no number."""
    config = tiny_config(data, output, "nproc=1")
    # what took several ranks
    of_many = tiny_config(data, output, "nproc=4", "embedding.replicas=2", "trainer.parallel.kind=fsdp")
    folder = RunFolder(config.run_dir)
    with process_group("cpu", 60) as world:
        session = build(config, world)
        if poisoned:
            with torch.no_grad():
                session.recommender.tower.get_parameter("encoder.layers.1.output.bias")[3] = math.nan
        state = TrainState(step=3).state_dict()
        manager = CheckpointManager(folder.checkpoints, keep=3)
        manager.save(session.tensors(), state, best_step=-1)
        # step 4 was refused, but step 5 was not
        manager.save(session.tensors(), TrainState(step=6).state_dict(), best_step=-1)
        batch = next(session.loader(Split.TRAIN).epoch(0))
    save(of_many, folder.config_file)
    refusal = Refusal(batch, Workload.causal(batch.lengths.tolist()), "the loss is not a finite number on rank 7")
    write_refused(folder.replay / "step-00000004" / "rank-7.pt", RefusedStep(4, refusal))
    said: list[str] = []
    replay(folder.replay / "step-00000004", said.append)
    return said


@pytest.mark.distributed
@pytest.mark.parametrize("poisoned", [False, True])
def test_a_replay_says_what_is_wrong(poisoned: bool, tiny_data: Path, tmp_path: Path) -> None:
    ((head, line),) = run_ranks(1, replayed, tiny_data, tmp_path, poisoned)
    assert head == ("step 4: the loss is not a finite number on rank 7; with the checkpoint of step 3, 1 steps before:")
    assert line.startswith("rank-7: 8 sequences, loss ")
    if poisoned:
        assert "loss nan; first output that is not finite: encoder.layers.1; gradients" in line
        assert "encoder.layers.0.uvqk.weight" in line and line.endswith("item table")
    else:
        assert line.endswith("; all gradients are finite")


def test_what_is_no_refused_step(tmp_path: Path) -> None:
    (tmp_path / "rank-0.pt").write_bytes(b"nonsense")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no refused step"):
            replay(folder, print)
