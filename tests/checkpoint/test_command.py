"""`checkpoint inspect|verify|export` on a run of two ranks, without any rank."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hstu_dist.__main__ import main
from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.commands.checkpoint import weight_records
from hstu_dist.config import save
from hstu_dist.distributed.process_group import process_group
from hstu_dist.errors import ExitCode
from hstu_dist.run_folder import RunFolder
from hstu_dist.train.state import TrainState
from tests.distributed.cases import build, snapshot, tiny_config
from tests.distributed.ranks import run_ranks

# a width that is padded to 8 in the table
WIDTH = 6


def write_run(data: Path, output: Path) -> dict[str, Tensor]:
    with process_group("cpu", 60) as world:
        config = tiny_config(data, output, f"model.width={WIDTH}", "embedding.optimizer.kind=adamw")
        folder = RunFolder(Path(config.run_dir))
        session = build(config, world)
        manager = CheckpointManager(folder.checkpoints, keep=2)
        for step in (8, 16):
            manager.save(session.tensors(), TrainState(epoch=step // 8, step=step).state_dict(), best_step=-1)
        if world.is_main:
            save(config, folder.config_file)
        return snapshot(session)


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    output = tmp_path_factory.mktemp("runs")
    return output / "tiny", run_ranks(2, write_run, tiny_data, output)[0]


@pytest.mark.distributed
def test_inspect_shows_step_writer_and_tensors(
    run: tuple[Path, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tensors = run
    for path in (folder, folder / "checkpoints", folder / "checkpoints" / "step-00000016"):
        assert main(["checkpoint", "inspect", str(path)]) == 0
        out = capsys.readouterr().out
        assert "step-00000016: step 16, epoch 2, batch 0" in out and "written by 2 ranks in 2 files" in out
        lines = {line.split()[0]: line.split() for line in out.splitlines()[3:]}
        assert lines.keys() == tensors.keys()
        (table,) = (name for name in tensors if name.startswith("table."))
        # 40 items, 20 on each rank
        assert lines[table][1:] == ["F32", "40", "x", "8", "2", "1,280"]
        assert lines["table_optimizer.step"][1:] == ["I64", "scalar", "1", "8"]


@pytest.mark.distributed
def test_verify_names_damage(
    run: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run[0], tmp_path / "run")
    assert main(["checkpoint", "verify", str(folder)]) == 0
    out = capsys.readouterr().out
    assert [line.split(": ")[1].split(",")[0] for line in out.splitlines()] == ["whole", "whole"]
    file = folder / "checkpoints" / "step-00000008" / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert main(["checkpoint", "verify", str(folder)]) == ExitCode.BAD_INPUT
    printed = capsys.readouterr()
    assert "rank-00001.safetensors is altered" in printed.err and "1 checkpoints are damaged" in printed.err
    assert "step-00000016: whole" in printed.out


@pytest.mark.distributed
def test_export_gives_table_and_tower(
    run: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tensors = run
    output = tmp_path / "weights.safetensors"
    assert main(["checkpoint", "export", str(folder), str(output)]) == 0
    exported = load_file(output)
    expected = {name: value for name, value in tensors.items() if name.startswith("tower.")}
    (expected["item_table.weight"],) = (v[:, :WIDTH] for name, v in tensors.items() if name.startswith("table."))
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], value) for name, value in expected.items())
    # never over something that is there
    assert main(["checkpoint", "export", str(folder), str(output)]) == ExitCode.BAD_INPUT
    assert "cannot be written (File exists)" in capsys.readouterr().err and load_file(output).keys() == expected.keys()
    alone = shutil.copytree(folder / "checkpoints" / "step-00000016", tmp_path / "step-00000016")
    assert main(["checkpoint", "export", str(alone), str(tmp_path / "other")]) == ExitCode.BAD_INPUT
    assert "export it from within its run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere: got no checkpoint"),
        (["verify", "."], ": got no checkpoint"),
        (["inspect", "nowhere", "file"], "export needs an output file, the others none"),
        (["reshard", "nowhere"], "got --ranks None"),
        (["verify", "nowhere", "--ranks", "2"], "got --ranks 2"),
        (["reshard", "nowhere", "--ranks", "0"], "--ranks: got 0, expected at least 1"),
        (["export", "nowhere"], "export needs an output file, the others none"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["checkpoint", *arguments]) == ExitCode.BAD_INPUT
    assert message in capsys.readouterr().err


def test_help_says_that_runs_need_no_resharding(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["checkpoint", "--help"])
    assert "continues from a checkpoint as it is" in " ".join(capsys.readouterr().out.split())


@pytest.mark.distributed
def test_looking_needs_no_torch(run: tuple[Path, dict[str, Tensor]]) -> None:
    code = (
        "import sys\nfrom hstu_dist.__main__ import main\n"
        f"for what in ('inspect', 'verify'):\n    assert main(['checkpoint', what, {str(run[0])!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_what_has_no_average_is_exported_as_it_is() -> None:
    records = {name: object() for name in ("tower.a", "tower.mask", "average.tower.a", "optimizer.tower.a", "table.x")}
    exported = weight_records(cast(Any, SimpleNamespace(tensors=records)))
    assert exported == {
        "tower.a": records["average.tower.a"],
        "tower.mask": records["tower.mask"],
        "table.x": records["table.x"],
    }
