"""Which checkpoints exist, and what is said about one that cannot be used; one rank, plain tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.checkpoint.storage import FORMAT_VERSION, STATE_FILE
from hstu_dist.distributed.process_group import process_group
from hstu_dist.errors import UserError


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RANK", raising=False)
    with process_group("cpu", 30):
        yield


def tensors_of(value: float) -> dict[str, Tensor]:
    return {"a.weight": torch.full((3, 2), value), "a.step": torch.tensor(value, dtype=torch.float32)}


def save(manager: CheckpointManager, *steps: int, best_step: int = -1) -> None:
    for step in steps:
        manager.save(tensors_of(float(step)), {"step": step, "note": f"at {step}"}, best_step)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "checkpoints", keep=2)
    assert manager.steps() == []
    save(manager, 7, 123456789)
    assert manager.steps() == [7, 123456789]
    loaded = tensors_of(0.0)
    assert manager.load(7, loaded) == {"step": 7, "note": "at 7"}
    assert all(torch.equal(loaded[name], value) for name, value in tensors_of(7.0).items())


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    save(manager, 5)
    manager.save(tensors_of(99.0), {"step": 5}, best_step=-1)
    loaded = tensors_of(0.0)
    manager.load(5, loaded)
    assert manager.steps() == [5] and float(loaded["a.step"]) == 99.0


@pytest.mark.parametrize(
    ("keep", "best", "expected"),
    [(1, -1, [6]), (2, -1, [5, 6]), (2, 3, [3, 5, 6]), (2, 6, [5, 6]), (9, 2, [*range(7)])],
)
def test_the_newest_and_the_best_stay(keep: int, best: int, expected: list[int], tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep)
    save(manager, *range(7), best_step=best)
    assert manager.steps() == expected
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"step-{step:08d}" for step in expected]


def test_an_unfinished_checkpoint_is_ignored_and_cleaned_up(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    save(manager, 1)
    unfinished = tmp_path / "step-00000002.unfinished"
    (unfinished / "tensors").mkdir(parents=True)
    (unfinished / STATE_FILE).write_text("{")
    (tmp_path / "notes").mkdir()
    assert manager.steps() == [1]
    save(manager, 2)
    assert manager.steps() == [1, 2] and not unfinished.exists()
    # what is not ours stays
    assert (tmp_path / "notes").is_dir()
    manager.load(2, tensors_of(0.0))


def damage_tensors(folder: Path) -> None:
    (file,) = (folder / "tensors").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-40])


def remove_tensors(folder: Path) -> None:
    (file,) = (folder / "tensors").glob("*.distcp")
    file.unlink()


def damage_metadata(folder: Path) -> None:
    file = folder / "tensors" / ".metadata"
    file.write_bytes(file.read_bytes()[:50])


def remove_metadata(folder: Path) -> None:
    (folder / "tensors" / ".metadata").unlink()


def damage_state(folder: Path) -> None:
    (folder / STATE_FILE).write_text('{"format": 1, "st')


def remove_state(folder: Path) -> None:
    (folder / STATE_FILE).unlink()


def empty_state(folder: Path) -> None:
    (folder / STATE_FILE).write_text("{}")


def list_state(folder: Path) -> None:
    (folder / STATE_FILE).write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [
        damage_tensors,
        remove_tensors,
        damage_metadata,
        remove_metadata,
        damage_state,
        remove_state,
        empty_state,
        list_state,
    ],
    ids=lambda f: f.__name__,
)
def test_a_damaged_checkpoint_is_named(damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    manager = CheckpointManager(tmp_path, keep=2)
    save(manager, 3, 4)
    damage(manager.path(4))
    with pytest.raises(UserError, match=r"checkpoint .*step-00000004: .*cannot be read") as caught:
        manager.load(4, tensors_of(0.0))
    assert "delete this folder" in caught.value.remedy
    # which helps: the older one is whole
    loaded = tensors_of(0.0)
    manager.load(3, loaded)
    assert float(loaded["a.step"]) == 3.0


def test_another_shape_is_named(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    save(manager, 3)
    with pytest.raises(UserError, match=r"step-00000003: a.weight is \(3, 2\), expected shape \(3, 4\)"):
        manager.load(3, {**tensors_of(0.0), "a.weight": torch.zeros(3, 4)})
    with pytest.raises(UserError, match=r"step-00000003: b.weight is missing, expected shape \(5,\)"):
        manager.load(3, {**tensors_of(0.0), "b.weight": torch.zeros(5)})


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    save(manager, 3)
    file = manager.path(3) / STATE_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": FORMAT_VERSION + 1}))
    with pytest.raises(UserError, match=rf"got format {FORMAT_VERSION + 1}, expected at most {FORMAT_VERSION}"):
        manager.load(3, tensors_of(0.0))
