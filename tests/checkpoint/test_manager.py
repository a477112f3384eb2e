"""Which checkpoints exist, and what is said about one that cannot be used; one rank, plain tensors."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.checkpoint.manifest import FORMAT_VERSION, MANIFEST_FILE, DamagedCheckpointError, content_hash
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
    # older ones are removed in the background
    manager.finish()


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


@pytest.mark.slow
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
    unfinished.mkdir(parents=True)
    (unfinished / MANIFEST_FILE).write_text("{")
    (tmp_path / "notes").mkdir()
    assert manager.steps() == [1]
    save(manager, 2)
    assert manager.steps() == [1, 2] and not unfinished.exists()
    # what is not ours stays
    assert (tmp_path / "notes").is_dir()
    manager.load(2, tensors_of(0.0))


FILE = "rank-00000.safetensors"


def alter(folder: Path) -> str:
    """One bit, the size as before."""
    content = bytearray((folder / FILE).read_bytes())
    content[-3] ^= 4
    (folder / FILE).write_bytes(content)
    return rf"{FILE} is altered"


def cut_short(folder: Path) -> str:
    size = (folder / FILE).stat().st_size
    os.truncate(folder / FILE, size - 5)
    return rf"{FILE} has {size - 5} bytes, expected {size}"


def lengthen(folder: Path) -> str:
    (folder / FILE).write_bytes((folder / FILE).read_bytes() + b"x")
    return rf"{FILE} has"


def remove(folder: Path) -> str:
    (folder / FILE).unlink()
    return rf"{FILE} is missing"


def remove_manifest(folder: Path) -> str:
    (folder / MANIFEST_FILE).unlink()
    return rf"{MANIFEST_FILE} is missing"


def cut_manifest(folder: Path) -> str:
    content = (folder / MANIFEST_FILE).read_text()
    (folder / MANIFEST_FILE).write_text(content[: len(content) // 2])
    return rf"{MANIFEST_FILE} cannot be read"


def alter_manifest(folder: Path) -> str:
    content = (folder / MANIFEST_FILE).read_text()
    (folder / MANIFEST_FILE).write_text(content.replace("at 4", "at 5"))
    return rf"{MANIFEST_FILE} has another checksum"


def empty_manifest(folder: Path) -> str:
    (folder / MANIFEST_FILE).write_text("{}")
    return rf"{MANIFEST_FILE} cannot be read"


def list_manifest(folder: Path) -> str:
    (folder / MANIFEST_FILE).write_text("[]")
    return rf"{MANIFEST_FILE} cannot be read"


DAMAGES = [
    alter,
    cut_short,
    lengthen,
    remove,
    remove_manifest,
    cut_manifest,
    alter_manifest,
    empty_manifest,
    list_manifest,
]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    damage: Callable[[Path], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = CheckpointManager(tmp_path, keep=3)
    save(manager, 2, 3, 4)
    reason = damage(manager.path(4))
    loaded = tensors_of(0.0)
    with pytest.raises(DamagedCheckpointError, match=rf"checkpoint .*step-00000004: {reason}"):
        manager.load(4, loaded)
    assert all(torch.equal(loaded[name], value) for name, value in tensors_of(0.0).items())
    with caplog.at_level(logging.WARNING):
        assert manager.load_newest(loaded, set_aside=False) == {"step": 3, "note": "at 3"}
    assert float(loaded["a.step"]) == 3.0 and manager.steps() == [2, 3, 4]
    assert "step-00000004" in caplog.text and caplog.text.rstrip().endswith("going on from step 3")
    manager.load_newest(loaded)
    assert manager.steps() == [2, 3] and (tmp_path / "step-00000004.damaged").is_dir()
    # set aside, it cannot drive a whole one out
    save(CheckpointManager(tmp_path, keep=1), 4)
    assert manager.steps() == [4] and manager.load(4, loaded)


def test_without_any_whole_checkpoint_nothing_is_trained_over(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    assert manager.load_newest(tensors_of(0.0)) is None
    save(manager, 3, 4)
    for step in (3, 4):
        remove(manager.path(step))
    with pytest.raises(UserError, match=r"step-00000004: .* is missing, and no other checkpoint is whole") as caught:
        manager.load_newest(tensors_of(0.0))
    assert "another run name" in caught.value.remedy and manager.steps() == [3, 4]


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step-00000009: not found"):
        CheckpointManager(tmp_path, keep=2).load(9, tensors_of(0.0))


class Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, (str(self.target),)  # type: ignore[return-value]


def test_loading_runs_no_code_of_a_checkpoint(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "checkpoints", keep=2)
    save(manager, 3)
    bomb = pickle.dumps(Bomb(tmp_path / "gone off"))
    for name in (".metadata", FILE, MANIFEST_FILE):
        (manager.path(3) / name).write_bytes(bomb)
        with pytest.raises(UserError) if name != ".metadata" else nullcontext():
            manager.load(3, tensors_of(0.0))
    assert not (tmp_path / "gone off").exists()
    # the bomb is one
    pickle.loads(bomb)
    assert (tmp_path / "gone off").exists()


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    save(manager, 3)
    file = manager.path(3) / MANIFEST_FILE
    file.write_text(file.read_text().replace(FILE, f"../{FILE}"))
    document = json.loads(file.read_text())
    document["xxh3"] = content_hash(document["manifest"])
    file.write_text(json.dumps(document))
    with pytest.raises(DamagedCheckpointError, match="should match pattern"):
        manager.load(3, tensors_of(0.0))


def test_the_library_reads_a_checkpoint_file(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    tensors = {
        "double": torch.randn(3, 2, dtype=torch.float64),
        "half": torch.randn(5).to(torch.bfloat16),
        "strided": torch.randn(4, 6).t(),
        "flag": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "nothing": torch.zeros(0, 4),
    }
    manager.save(tensors, {"step": 1}, -1)
    found = load_file(manager.path(1) / FILE)
    assert {name.split("@")[0] for name in found} == tensors.keys()
    for name, value in found.items():
        expected = tensors[name.split("@")[0]]
        assert value.dtype == expected.dtype and torch.equal(value, expected)
    loaded = {name: torch.zeros_like(value) for name, value in tensors.items()}
    manager.load(1, loaded)
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_another_shape_dtype_or_name_is_refused_by_name(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    save(manager, 3)
    whole = tensors_of(0.0)
    for wanted, message in (
        (
            {**whole, "a.weight": torch.zeros(3, 4)},
            r"a.weight: got F32 of shape \(3, 2\), expected F32 of shape \(3, 4\)",
        ),
        ({**whole, "a.step": torch.tensor(0)}, r"a.step: got F32 of shape \(\), expected I64 of shape \(\)"),
        ({**whole, "b": torch.zeros(5)}, r"b: got nothing, expected F32 of shape \(5,\)"),
        ({"a.weight": whole["a.weight"]}, r"a.step: got F32 of shape \(\), expected nothing"),
    ):
        with pytest.raises(UserError, match=rf"step-00000003: {message}") as caught:
            manager.load_newest(wanted)
        assert not isinstance(caught.value, DamagedCheckpointError)


def test_another_format_is_refused(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    save(manager, 2, 3)
    file = manager.path(3) / MANIFEST_FILE
    file.write_text(json.dumps({"format": FORMAT_VERSION + 1, "whatever": "follows"}))
    # not passed over: the newer version's work would be lost
    with pytest.raises(UserError, match=rf"got format {FORMAT_VERSION + 1}, expected {FORMAT_VERSION}") as caught:
        manager.load_newest(tensors_of(0.0))
    assert caught.value.remedy == "update hstu_dist"
    file.unlink()
    (manager.path(3) / "state.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=rf"got format 1, expected {FORMAT_VERSION}"):
        manager.load_newest(tensors_of(0.0))
    assert manager.steps() == [2, 3]
