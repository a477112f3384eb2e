"""Checkpoints written while training goes on: the same state, one at a time, and failures that are heard."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hstu_dist.checkpoint import manager as manager_module
from hstu_dist.checkpoint.background import Background, HostCopies
from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.distributed.process_group import process_group
from hstu_dist.train.config import CheckpointConfig
from hstu_dist.train.hooks import CheckpointHook
from hstu_dist.train.state import TrainState
from tests.checkpoint.test_resume import EPOCHS, config_of, same
from tests.distributed.cases import LossHook, build, snapshot, trainer_of
from tests.distributed.ranks import run_ranks

_EVERY = 5
_STEPS = [5, 8, 10, 15, 16]
_DELAY = 0.15


def slowly(*arguments: Any) -> None:
    """Writes so late that training has long moved on."""
    time.sleep(_DELAY)
    write_tensors(*arguments)


write_tensors = manager_module.write_tensors


def train_both_ways(data: Path, folder: Path, sharding: str) -> dict[str, Any]:
    """A run that saves synchronously, the same in the background, and one that resumes from the latter's third step."""
    found: dict[str, Any] = {}
    with process_group("cpu", 60) as world:
        for name in ("synchronous", "asynchronous"):
            session = build(config_of(data, sharding), world)
            manager = CheckpointManager(folder / name, 9, asynchronous=name == "asynchronous")
            losses: list[float] = []
            saving = CheckpointHook(CheckpointConfig(every_steps=_EVERY), manager, session.tensors)
            write = slowly if name == "asynchronous" else write_tensors
            with mock.patch.object(manager_module, "write_tensors", write):
                trainer_of(session, TrainState(), EPOCHS, [LossHook(losses), saving]).fit()
            stored = []
            for step in manager.steps():
                other = build(config_of(data, sharding, "seed=9"), world)
                state = TrainState()
                state.load_state_dict(manager.load(step, other.tensors()))
                stored.append((step, state, snapshot(other)))
            found[name] = {"losses": losses, "stored": stored, "final": snapshot(session)}
        session = build(config_of(data, sharding), world)
        state = TrainState()
        state.load_state_dict(CheckpointManager(folder / "asynchronous", 9).load(_STEPS[0], session.tensors()))
        losses = []
        trainer_of(session, state, EPOCHS, [LossHook(losses)]).fit()
        found["resumed"] = {"losses": losses, "final": snapshot(session)}
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_training_on_changes_nothing_in_what_is_written(sharding: str, tiny_data: Path, tmp_path: Path) -> None:
    for rank in run_ranks(2, train_both_ways, tiny_data, tmp_path, sharding):
        ours, theirs, resumed = rank["asynchronous"], rank["synchronous"], rank["resumed"]
        assert ours["losses"] == theirs["losses"] and same(ours["final"], theirs["final"])
        assert [step for step, _, _ in ours["stored"]] == [step for step, _, _ in theirs["stored"]] == _STEPS
        for (_, state, tensors), (_, expected_state, expected) in zip(ours["stored"], theirs["stored"], strict=True):
            assert state == expected_state and same(tensors, expected)
        assert resumed["losses"] == theirs["losses"][_STEPS[0] :] and same(resumed["final"], theirs["final"])


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("RANK", raising=False)
    with process_group("cpu", 30):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
def test_one_save_is_in_flight_and_the_next_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, released = [0], [0], threading.Event()

    def watched(*arguments: Any) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        assert released.wait(30)
        slowly(*arguments)
        running[0] -= 1

    monkeypatch.setattr(manager_module, "write_tensors", watched)
    manager = CheckpointManager(tmp_path, keep=9, asynchronous=True)
    tensors = {"a": torch.zeros(3)}
    for step in range(3):
        manager.save(tensors, {"step": step}, -1)
        if step == 0:
            # it came back before anything was written
            assert manager.steps() == []
            released.set()
        else:
            assert step - 1 in manager.steps()
        tensors["a"] += 1
    manager.finish()
    assert manager.steps() == [0, 1, 2] and most == [1] and manager.saved_step == 2
    for step in range(3):
        manager.load(step, tensors)
        assert tensors["a"].tolist() == [step] * 3


@pytest.mark.usefixtures("one_rank")
def test_an_error_of_the_thread_is_raised_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("rank 1: Connection closed by peer")

    manager = CheckpointManager(tmp_path, keep=9, asynchronous=True)
    monkeypatch.setattr(manager_module, "write_tensors", broken)
    manager.save({"a": torch.zeros(3)}, {"step": 1}, -1)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        manager.finish()
    assert manager.steps() == [] and manager.saved_step == -1
    # heard once
    manager.finish()


def test_a_run_that_fails_does_not_wait_for_ever() -> None:
    background, forever = Background(), threading.Event()
    background.start(lambda: bool(forever.wait(20)))
    began = time.monotonic()
    background.wait(0.05)
    assert time.monotonic() - began < 5
    with pytest.raises(ValueError, match="expected `wait` before it"):
        background.start(lambda: None)
    forever.set()
    background.wait()
    background.start(lambda: None)
    background.wait()


def test_host_memory_is_reused() -> None:
    copies, tensors = HostCopies(), {"a": torch.arange(4.0), "b": torch.tensor(3)}
    first = {index.fqn: copy.data_ptr() for index, copy in copies.take(tensors).items()}
    tensors["a"] += 1
    again = copies.take(tensors)
    assert {index.fqn: copy.data_ptr() for index, copy in again.items()} == first
    assert {index.fqn: copy.tolist() for index, copy in again.items()} == {"a": [1.0, 2.0, 3.0, 4.0], "b": 3}
    # another run may have other shapes
    assert {i.fqn: c.shape for i, c in copies.take({"a": torch.zeros(2)}).items()}["a"] == (2,)
