"""`checkpoint reshard`: other files with the same content, which a run goes on from; interrupted, the old ones."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_dist.__main__ import main
from hstu_dist.checkpoint import offline
from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.checkpoint.manifest import Manifest, read_manifest
from hstu_dist.checkpoint.offline import read_whole
from hstu_dist.commands.fitting import restore
from hstu_dist.config import save
from hstu_dist.distributed.process_group import process_group
from hstu_dist.errors import ExitCode
from hstu_dist.run_folder import RunFolder
from hstu_dist.train.config import CheckpointConfig
from hstu_dist.train.hooks import CheckpointHook
from hstu_dist.train.state import TrainState
from tests.distributed.cases import LossHook, build, snapshot, tiny_config, trainer_of
from tests.distributed.ranks import run_ranks

STOP = 5
SETTINGS = {
    "row_wise": ["embedding.optimizer.kind=adamw"],
    "fsdp": ["embedding=table_wise", "embedding.optimizer.kind=rowwise_adamw", "trainer.parallel.kind=fsdp"],
}


def train_part(data: Path, output: Path) -> dict[str, Any]:
    """Runs stopped on the way; what they have saved, and the losses that would follow."""
    found = {}
    with process_group("cpu", 60) as world:
        for name, overrides in SETTINGS.items():
            config = tiny_config(data, output, f"name={name}", *overrides)
            folder = RunFolder(config.run_dir)
            session = build(config, world)
            saving = CheckpointHook(CheckpointConfig(), CheckpointManager(folder.checkpoints, 9), session.tensors)
            losses: list[float] = []
            state = TrainState()
            trainer = trainer_of(session, state, 1, [LossHook(losses), saving])
            trainer.stop_requested = lambda state=state: state.step == STOP  # type: ignore[misc]
            trainer.fit()
            if world.is_main:
                save(config, folder.config_file)
            saved = snapshot(session)
            trainer_of(session, state, 1, [LossHook(losses)]).fit()
            found[name] = (saved, losses[STOP:])
    return found


def go_on(data: Path, output: Path) -> dict[str, Any]:
    """What this number of ranks restores and how it goes on; it also writes anew what it restored."""
    found = {}
    with process_group("cpu", 60) as world:
        for name, overrides in SETTINGS.items():
            session = build(tiny_config(data, output, f"name={name}", "seed=1", *overrides), world)
            state = restore(session, CheckpointManager(RunFolder(output / name).checkpoints, 9))
            restored = snapshot(session)
            CheckpointManager(output / name / f"written-by-{world.size}", 9).save(
                session.tensors(), state.state_dict(), -1
            )
            losses: list[float] = []
            trainer_of(session, state, 1, [LossHook(losses)]).fit()
            found[name] = (restored, losses)
    return found


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("runs")
    return output, run_ranks(2, train_part, tiny_data, output)[0]


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / f"step-{STOP:08d}"


def content(folder: Path) -> dict[str, Tensor]:
    return {name: read_whole(folder, record) for name, record in read_manifest(folder).tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def blocks(manifest: Manifest) -> dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Of tensors that are split over ranks: offsets and sizes."""
    return {
        name: [(chunk.offsets, chunk.sizes) for chunk in record.chunks if all(chunk.sizes)]
        for name, record in manifest.tensors.items()
        if len(record.chunks) > 1
    }


@pytest.mark.distributed
def test_a_run_goes_on_from_other_files(trained: Any, tiny_data: Path, tmp_path: Path) -> None:
    source, expected = trained
    output = shutil.copytree(source, tmp_path / "runs")
    for name in SETTINGS:
        assert main(["checkpoint", "reshard", str(output / name), "--ranks", "3"]) == 0
        assert main(["checkpoint", "verify", str(output / name)]) == 0
        folder = checkpoint_of(output / name)
        manifest = read_manifest(folder)
        files = [f"rank-{rank:05d}-of-00003.safetensors" for rank in range(3)]
        assert sorted(file.name for file in folder.glob("*.safetensors")) == files == sorted(manifest.files)
        assert manifest.world_size == 3
        assert same(content(folder), expected[name][0])
    for restored_and_losses in run_ranks(3, go_on, tiny_data, output):
        for name, (restored, losses) in restored_and_losses.items():
            assert same(restored, expected[name][0])
            assert losses == pytest.approx(expected[name][1], rel=1e-5) and len(losses) == 3
    # the tables' rows, and a sharded tower's, lie as three ranks laid them
    written = read_manifest(output / "row_wise" / "written-by-3" / f"step-{STOP:08d}")
    assert blocks(written) == blocks(read_manifest(checkpoint_of(output / "row_wise"))) != {}
    written = read_manifest(output / "fsdp" / "written-by-3" / f"step-{STOP:08d}")
    resharded = blocks(read_manifest(checkpoint_of(output / "fsdp")))
    sharded = {name: parts for name, parts in blocks(written).items() if name.startswith(("tower.", "optimizer."))}
    assert sharded and all(resharded[name] == parts for name, parts in sharded.items())


@pytest.mark.distributed
@pytest.mark.parametrize("name", SETTINGS)
def test_any_number_of_files_holds_the_same(
    name: str, trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint_of(shutil.copytree(trained[0] / name, tmp_path / "run"))
    whole = content(folder)
    for ranks in (8, 1, 4, 64, 2, 2):
        assert main(["checkpoint", "reshard", str(folder), "--ranks", str(ranks)]) == 0
        assert same(content(folder), whole)
        manifest = read_manifest(folder)
        assert manifest.state["step"] == STOP and len(manifest.files) <= ranks
        assert sorted(manifest.files) == sorted(file.name for file in folder.glob("*.safetensors"))
    said = capsys.readouterr().out.splitlines()
    assert "written by 64 ranks, now as 2 ranks write it, 2 files" in said[-2]
    assert "already as 2 ranks write it" in said[-1]


@pytest.mark.distributed
def test_nothing_is_lost_where_writing_fails(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained[0] / "row_wise", tmp_path / "run")
    folder = checkpoint_of(run)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(offline, "write_manifest", full)
        assert main(["checkpoint", "reshard", str(folder), "--ranks", "4"]) == ExitCode.BAD_INPUT
    assert "cannot be rewritten (No space left on device), it is as before" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    # killed while it wrote: what it left is no obstacle
    (folder / "rank-00001-of-00004.safetensors").write_bytes(b"half")
    assert main(["checkpoint", "verify", str(folder)]) == 0
    assert main(["checkpoint", "reshard", str(folder), "--ranks", "4"]) == 0
    assert main(["checkpoint", "verify", str(folder)]) == 0
    # killed before the old files were removed: nor is that
    (folder / "rank-00000.safetensors").write_bytes(before["rank-00000.safetensors"])
    assert main(["checkpoint", "verify", str(folder)]) == 0
    assert main(["checkpoint", "reshard", str(folder), "--ranks", "2"]) == 0
    assert not (folder / "rank-00000.safetensors").exists()


@pytest.mark.distributed
def test_damage_and_a_run_that_trains_are_refused(
    trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hstu_dist.run_folder._LOCK_SECONDS", 0.1)
    run = shutil.copytree(trained[0] / "row_wise", tmp_path / "run")
    folder = checkpoint_of(run)
    with RunFolder(run).lock():
        assert main(["checkpoint", "reshard", str(run), "--ranks", "4"]) == ExitCode.BAD_INPUT
    assert "another process is training in it" in capsys.readouterr().err
    file = folder / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    before = sorted(folder.iterdir())
    assert main(["checkpoint", "reshard", str(run), "--ranks", "4"]) == ExitCode.BAD_INPUT
    assert "rank-00001.safetensors has" in capsys.readouterr().err and sorted(folder.iterdir()) == before
