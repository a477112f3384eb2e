"""A run that stopped anywhere goes on as if it had not, bit for bit; other ranks or sharding load the same state."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.commands.fitting import restore
from hstu_dist.commands.session import Session
from hstu_dist.distributed.process_group import World, process_group
from hstu_dist.errors import UserError
from hstu_dist.train.config import CheckpointConfig
from hstu_dist.train.hooks import CheckpointHook
from hstu_dist.train.state import TrainState
from tests.distributed.cases import LossHook, build, snapshot, tiny_config, trainer_of
from tests.distributed.ranks import run_ranks

SHARDINGS = ("row_wise", "table_wise")
# 60 users in batches of 8: 8 steps an epoch
EPOCHS = 2
STEPS = 16
STOP = 5
# state that a checkpoint could forget: moments, step counts, schedule, decay
SETTINGS = [
    "optimizer.schedule.kind=cosine",
    "optimizer.schedule.warmup_steps=3",
    "optimizer.weight_decay=0.1",
    "embedding.optimizer.kind=adamw",
    "embedding.optimizer.weight_decay=0.1",
    "optimizer.average_decay=0.8",
]


def config_of(data: Path, sharding: str, *overrides: str):  # type: ignore[no-untyped-def]
    return tiny_config(data, Path("unused"), f"embedding={sharding}", *SETTINGS, *overrides)


def train_on(
    session: Session, state: TrainState, folder: Path, stop_at: int | None = None, every: int | None = None
) -> list[float]:
    """Losses up to the end or to a request to stop, which one rank alone hears."""
    losses: list[float] = []
    saving = CheckpointHook(CheckpointConfig(every_steps=every), CheckpointManager(folder, 9), session.tensors)
    trainer = trainer_of(session, state, EPOCHS, [LossHook(losses), saving])
    trainer.stop_requested = lambda: session.world.rank == session.world.size - 1 and state.step == stop_at
    trainer.fit()
    assert trainer.interrupted == (stop_at is not None)
    return losses


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_resume(world: World, data: Path, folder: Path, sharding: str) -> dict[str, Any]:
    session = build(config_of(data, sharding), world)
    state = TrainState()
    losses = train_on(session, state, folder / "whole")
    final = snapshot(session)

    stopped = build(config_of(data, sharding), world)
    stopped_state = TrainState()
    first = train_on(stopped, stopped_state, folder / sharding, stop_at=STOP)
    saved = snapshot(stopped)

    # another seed: what the checkpoint does not bring would differ
    resumed = build(config_of(data, sharding, "seed=9"), world)
    resumed_state = restore(resumed, CheckpointManager(folder / sharding, 9))
    restored = snapshot(resumed)
    resumed = build(config_of(data, sharding), world)
    resumed_state = restore(resumed, CheckpointManager(folder / sharding, 9))
    rest = train_on(resumed, resumed_state, folder / "resumed")
    return {
        "round trip": same(saved, restored),
        "losses": (losses, first, rest),
        "states": (state, resumed_state, stopped_state.step),
        "stopped": stopped_state,
        "final": same(snapshot(resumed), final),
        "saved": saved,
    }


def check_all_resumes(data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    with process_group("cpu", 60) as world:
        return {sharding: check_resume(world, data, folder / sharding, sharding) for sharding in SHARDINGS}


def load_each(data: Path, folder: Path, last: bool) -> dict[str, Any]:
    """Every checkpoint under every sharding, at this number of ranks; saved again from there, to be loaded by the next.

    Goes around in the same folder: what one number of ranks wrote under one sharding, the next loads under the other.
    """
    found = {}
    with process_group("cpu", 60) as world:
        for source in SHARDINGS:
            manager = CheckpointManager(folder / source / source, 9)
            for target in SHARDINGS:
                session = build(config_of(data, target, "seed=9"), world)
                state = restore(session, manager)
                assert state.step == STOP
                found[f"{source} {target}"] = (snapshot(session), state)
                if not last:
                    # in place of what was loaded
                    manager.save(session.tensors(), state.state_dict(), state.best_step)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def resumes(tiny_data: Path, folder: Path) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(2, check_all_resumes, tiny_data, folder)


@pytest.mark.distributed
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_resuming_equals_never_stopping(resumes: Any, sharding: str) -> None:
    for rank in resumes:
        facts = rank[sharding]
        whole, first, rest = facts["losses"]
        assert len(whole) == STEPS and len(first) == STOP
        assert first + rest == whole
        state, resumed, stopped_at = facts["states"]
        assert resumed == state and state.step == STEPS and stopped_at == STOP
        assert facts["round trip"] and facts["final"]


@pytest.mark.distributed
def test_other_ranks_and_sharding_load_the_same_state(
    resumes: Any, tiny_data: Path, folder: Path, tmp_path: Path
) -> None:
    saved = resumes[0]["row_wise"]["saved"]
    for sharding in SHARDINGS:
        shutil.copytree(folder / sharding / sharding, tmp_path / sharding / sharding)
    # a table_wise run computes the same up to rounding; compared is what was saved with what is loaded
    sizes = (8, 3, 1, 4, 2)
    for world_size in sizes:
        for rank in run_ranks(world_size, load_each, tiny_data, tmp_path, world_size == sizes[-1]):
            assert len(rank) == 4
            for case, (loaded, state) in rank.items():
                facts = resumes[0][case.split()[0]]
                assert same(loaded, facts["saved"]), (world_size, case)
                assert state == facts["stopped"]
    table = {name.split(".")[-1]: value for name, value in saved.items() if name.startswith("table_optimizer.")}
    assert table["step"] == STOP and table["momentum1"].any() and table["exp_avg_sq"].gt(0).any()
    assert all(name in saved for name in ("tower.position.weight", "optimizer.position.weight.exp_avg_sq"))
    assert float(saved["optimizer.position.weight.step"]) == STOP


def continue_from(data: Path, folder: Path) -> tuple[list[float], TrainState]:
    with process_group("cpu", 60) as world:
        session = build(config_of(data, "row_wise"), world)
        state = restore(session, CheckpointManager(folder, 9))
        return train_on(session, state, folder.parent / f"continued-{world.size}"), state


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 3])
def test_training_goes_on_at_another_number_of_ranks(
    resumes: Any, world_size: int, tiny_data: Path, folder: Path
) -> None:
    whole, _, rest = resumes[0]["row_wise"]["losses"]
    for losses, state in run_ranks(world_size, continue_from, tiny_data, folder / "row_wise" / "row_wise"):
        assert losses == pytest.approx(rest, rel=1e-5) and len(losses) == len(whole) - STOP
        assert state == resumes[0]["row_wise"]["states"][0]


def load_changed(data: Path, folder: Path, overrides: list[str]) -> str:
    with process_group("cpu", 20) as world:
        session = build(config_of(data, "row_wise", *overrides), world)
        try:
            restore(session, CheckpointManager(folder, 9))
        except UserError as error:
            return error.problem
        return "loaded"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model.width=12"], "average."),
        (["embedding.optimizer.kind=sgd", "~embedding.optimizer.weight_decay"], "table_optimizer."),
        (["embedding.optimizer.kind=rowwise_adamw"], "table_optimizer."),
        (["embedding.optimizer.kind=rowwise_adagrad", "~embedding.optimizer.weight_decay"], "table_optimizer."),
    ],
)
def test_every_rank_refuses_what_does_not_fit(
    resumes: Any, overrides: list[str], reason: str, tiny_data: Path, folder: Path
) -> None:
    assert resumes
    stored = folder / "row_wise" / "row_wise"
    problems = run_ranks(2, load_changed, tiny_data, stored, overrides)
    (step,) = stored.iterdir()
    assert problems[0] == problems[1] and problems[0].startswith(f"checkpoint {step}: {reason}"), problems[0]
    assert ": got " in problems[0] and ", expected " in problems[0]


@pytest.mark.distributed
def test_damage_of_one_rank_s_file_reaches_every_rank(
    resumes: Any, tiny_data: Path, folder: Path, tmp_path: Path
) -> None:
    assert resumes
    shutil.copytree(folder / "row_wise" / "row_wise", tmp_path / "copy")
    (step,) = (tmp_path / "copy").iterdir()
    # the file that rank 1 checks
    file = max(step.glob("*.safetensors"), key=lambda f: f.name)
    file.write_bytes(file.read_bytes()[:100])
    for problem in run_ranks(2, load_changed, tiny_data, tmp_path / "copy", []):
        assert problem.startswith(f"checkpoint {step}: {file.name} has 100 bytes")


def save_every(data: Path, folder: Path) -> list[int]:
    with process_group("cpu", 60) as world:
        train_on(build(config_of(data, "row_wise"), world), TrainState(), folder, every=3)
        return CheckpointManager(folder, 9).steps()


@pytest.mark.distributed
def test_checkpoints_come_every_few_steps_and_after_each_epoch(tiny_data: Path, tmp_path: Path) -> None:
    # not at 8 and 16 twice, though nothing would be wrong with it
    assert run_ranks(1, save_every, tiny_data, tmp_path) == [[3, 6, 8, 9, 12, 15, 16]]
