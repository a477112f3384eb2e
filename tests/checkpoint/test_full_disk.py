"""A disk that fills up while a checkpoint is written: training goes on, what was saved stays, the next one succeeds."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.commands.fitting import restore
from hstu_dist.distributed.process_group import process_group
from hstu_dist.train.config import CheckpointConfig
from hstu_dist.train.hooks import CheckpointHook
from hstu_dist.train.state import TrainState
from hstu_dist.train.step import StepResult
from hstu_dist.train.trainer import Hook, Trainer
from tests.checkpoint.test_resume import EPOCHS, config_of, same
from tests.distributed.cases import build, snapshot, trainer_of
from tests.distributed.ranks import run_ranks

_DISK_BYTES = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def listening() -> list[str]:
    messages = Messages()
    logging.getLogger("hstu_dist").addHandler(messages)
    return messages.lines


def tensors_of(value: int) -> dict[str, Tensor]:
    return {"a": torch.full((75_000,), float(value)), "b": torch.full((300,), float(value))}


def fill_and_free(folder: Path, asynchronous: bool) -> dict[str, Any]:
    with process_group("cpu", 30) as world:
        lines = listening()
        manager = CheckpointManager(folder, keep=2, asynchronous=asynchronous)

        def save(step: int) -> None:
            manager.save(tensors_of(step), {"step": step}, -1)
            manager.finish()

        save(1)
        ballast = folder / "ballast"
        if world.is_main:
            ballast.write_bytes(bytes(600_000))
        torch.distributed.barrier()
        save(2)
        entries = sorted(entry.name for entry in folder.iterdir())
        whole = tensors_of(0)
        manager.load(1, whole)
        torch.distributed.barrier()
        if world.is_main:
            ballast.unlink()
        torch.distributed.barrier()
        saved_step = manager.saved_step
        save(3)
        loaded = tensors_of(0)
        manager.load(3, loaded)
        values = whole["a"].unique().tolist() + loaded["a"].unique().tolist()
        return {"lines": lines, "entries": entries, "values": values, "steps": manager.steps(), "saved": saved_step}


@pytest.mark.distributed
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_costs_one_checkpoint(asynchronous: bool, small_disk: Path) -> None:
    ranks = run_ranks(2, fill_and_free, small_disk, asynchronous)
    for rank in ranks:
        assert rank["entries"] == ["ballast", "step-00000001"] and rank["saved"] == 1
        assert rank["values"] == [1.0, 3.0] and rank["steps"] == [1, 3]
    (line,) = ranks[0]["lines"]
    assert line.startswith("checkpoint of step 2 is not written (rank ") and "No space left on device" in line
    assert ranks[1]["lines"] == []


class Limit(Hook):
    """Rank 1 cannot write files beyond a few bytes in some steps; needs no root."""

    def __init__(self, rank: int, steps: range) -> None:
        self.rank = rank
        self.steps = steps

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        limit = 100 if self.rank == 1 and trainer.state.step in self.steps else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def train_refused(data: Path, folder: Path, asynchronous: bool, refused: range) -> dict[str, Any]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with process_group("cpu", 60) as world:
        lines = listening()
        session, state = build(config_of(data, "row_wise"), world), TrainState()
        manager = CheckpointManager(folder, 9, asynchronous)
        saving = CheckpointHook(CheckpointConfig(every_steps=5), manager, session.tensors)
        # one at a time, so that the limit meets the save of its step
        finishing = Finish(manager.finish)
        trainer_of(session, state, EPOCHS, [Limit(world.rank, refused), saving, finishing]).fit()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        other = build(config_of(data, "row_wise", "seed=9"), world)
        restored = restore(other, manager)
        entries = sorted(entry.name for entry in folder.iterdir())
        equal = same(snapshot(other), snapshot(session)) and restored == state
        return {"lines": lines, "entries": entries, "equal": equal}


class Finish(Hook):
    def __init__(self, finish: Callable[[], None]) -> None:
        self.finish = finish

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.finish()

    def after_epoch(self, trainer: Trainer) -> None:
        self.finish()


@pytest.mark.distributed
@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_goes_on_when_one_rank_cannot_write(asynchronous: bool, tiny_data: Path, tmp_path: Path) -> None:
    ranks = run_ranks(2, train_refused, tiny_data, tmp_path, asynchronous, range(9, 12))
    for rank in ranks:
        assert rank["entries"] == [f"step-{step:08d}" for step in (5, 8, 15, 16)] and rank["equal"]
    (line,) = ranks[0]["lines"]
    assert line.startswith("checkpoint of step 10 is not written (rank 1: File too large)")


@pytest.mark.distributed
def test_the_last_checkpoint_is_tried_again(tiny_data: Path, tmp_path: Path) -> None:
    # the one after the last step is refused; by the end of the run there is room
    ranks = run_ranks(2, train_then_free, tiny_data, tmp_path)
    for rank in ranks:
        assert rank["entries"] == ["step-00000008", "step-00000016"]


class Free(Hook):
    def on_stop(self, trainer: Trainer) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def train_then_free(data: Path, folder: Path) -> dict[str, Any]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with process_group("cpu", 60) as world:
        session = build(config_of(data, "row_wise"), world)
        saving = CheckpointHook(CheckpointConfig(), CheckpointManager(folder, 9), session.tensors)
        hooks = [Limit(world.rank, range(16, 17)), Free(), saving]
        trainer_of(session, TrainState(), EPOCHS, hooks).fit()
        return {"entries": sorted(entry.name for entry in folder.iterdir())}
