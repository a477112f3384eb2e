"""`python -m launch` without ranks: what it prints, refuses, and leaves untouched."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from hstu_dist import run_folder
from hstu_dist.config import RunConfig, compose, load, save
from hstu_dist.data.identity import DataIdentity
from hstu_dist.data.schema import load_manifest
from hstu_dist.errors import ExitCode
from hstu_dist.run_folder import RunFolder
from launch import local
from launch.__main__ import KINDS, main
from launch.spec import LaunchSpec
from launch.torchrun import agent_command
from tests.launch.runs import REPOSITORY, Started
from tests.tiny import tiny_overrides


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have started an agent; any other new process fails the test."""
    commands: list[list[str]] = []

    def run(command: Sequence[str], _environment: Mapping[str, str], _restarts: int) -> int:
        commands.append(list(command))
        return ExitCode.FINISHED

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(local, "run", run)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    return commands


@pytest.fixture
def overrides(tiny_data: Path, tmp_path: Path) -> list[str]:
    return tiny_overrides(tiny_data, tmp_path / "runs")


@pytest.mark.slow
def test_needs_no_torch(tmp_path: Path, overrides: list[str]) -> None:
    code = f"""
import sys
import launch.__main__
assert launch.__main__.main({[*overrides, "dry_run=true"]}) == 0
assert launch.__main__.main({[*overrides, "cluster.memory_per_rank_gib=1e-9"]}) == 2
print([name for name in ("torch", "torchrec", "fbgemm_gpu", "triton") if name in sys.modules])
"""
    with Started(["-c", code], tmp_path) as process:
        ended = process.wait()
    assert (ended.code, ended.out.splitlines()[-1]) == (0, "[]"), ended.err


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["dry_run=true", "--dry-run"])
def test_dry_run_prints_the_command_and_touches_nothing(
    flag: str, overrides: list[str], tmp_path: Path, agents: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*overrides, "data.path=/nowhere", flag]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert shlex.split(printed)[2:] == agent_command(LaunchSpec.of(compose(overrides)))
    assert agents == [] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "cluster",
    [
        ["cluster=local"],
        ["cluster=hosts", "cluster.addresses=[a,b]"],
        ["cluster=slurm", "nodes=2"],
        ["cluster=kubernetes", "nodes=2", "cluster.claim=shared"],
    ],
)
def test_the_doctor_starts_where_a_run_would(
    cluster: list[str], overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["doctor", *overrides, *cluster, "data.path=/nowhere", "dry_run=true"]) == 0
    printed = capsys.readouterr().out
    assert "train" not in re.findall(r"-m hstu_dist (\w+)", printed)
    # agents learn it from launch.node
    assert "hstu_dist doctor --config" in printed or re.search(r"--program\W+doctor", printed)
    assert "runs/doctor" in printed and sorted(tmp_path.rglob("*")) == before


def test_starts_what_dry_run_prints(
    overrides: list[str], agents: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    main([*overrides, "dry_run=true"])
    printed = shlex.split(capsys.readouterr().out)[2:]
    assert main([*overrides, "dry_run=false"]) == 0
    assert agents == [printed]
    config = compose(overrides)
    folder = RunFolder(config.run_dir)
    assert load(folder.launch_file) == config
    # only the run itself writes what a later run is compared with
    assert not folder.config_file.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trainer.epoch=3", "trainer.epoch"),
        ("cluster=mainframe", "cluster/mainframe"),
        ("experiment=nothing", "experiment/nothing"),
        ("trainer.epochs=0", "trainer.epochs"),
        ("nproc=two", "nproc"),
        ("dry_run=maybe", "dry_run"),
        ("data.path=/nowhere", "/nowhere"),
        ("nproc=41", "41 ranks"),
        ("cluster.memory_per_rank_gib=1e-9", "embedding tables: "),
    ],
)
def test_bad_input_is_one_error_line(
    override: str,
    named: str,
    overrides: list[str],
    tmp_path: Path,
    agents: list[list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main([*overrides, override]) == ExitCode.BAD_INPUT
    printed = capsys.readouterr()
    error, mend = printed.err.splitlines()
    assert error.startswith("error: ") and named in error
    assert mend.startswith("  mend: ")
    assert printed.out == "" and agents == [] and sorted(tmp_path.rglob("*")) == before


def test_a_run_folder_that_cannot_be_written(
    overrides: list[str], tmp_path: Path, agents: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a file in the place of the folder")
    assert main(overrides) == ExitCode.BAD_INPUT
    error, mend = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: run folder {tmp_path}/runs/tiny: cannot be written") and "output=" in mend
    assert agents == []


def test_a_run_folder_with_other_settings(
    overrides: list[str], agents: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose([*overrides, "seed=2"])
    config.run_dir.mkdir(parents=True)
    save(config, RunFolder(config.run_dir).config_file)
    assert main(overrides) == ExitCode.BAD_INPUT
    assert "seed: 2 -> 1" in capsys.readouterr().err
    assert agents == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epochs", "stopped_early", "finished"), [(2, False, True), (1, False, False), (1, True, True)]
)
def test_a_finished_run_is_shown_without_ranks(
    epochs: int,
    stopped_early: bool,
    finished: bool,
    overrides: list[str],
    agents: list[list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = RunFolder(compose(overrides).run_dir)
    folder.path.mkdir(parents=True)
    metrics = {"hr@10": 0.25}
    result = {"epochs": epochs, "steps": 8 * epochs, "stopped_early": stopped_early, "best_epoch": 1}
    folder.finish({**result, "test": metrics, "popularity": metrics})
    assert main(overrides) == 0
    printed = capsys.readouterr().out
    assert (len(agents) == 0) == finished
    assert ("already finished" in printed and "0.2500" in printed) == finished


def finished_folder(config: RunConfig) -> RunFolder:
    """What a run of two epochs leaves."""
    folder, metrics = RunFolder(config.run_dir), {"hr@10": 0.25}
    folder.path.mkdir(parents=True)
    save(config, folder.config_file)
    result = {"epochs": 2, "steps": 16, "stopped_early": False, "best_epoch": 1, "test": metrics, "popularity": metrics}
    folder.finish(result)
    return folder


def test_a_finished_run_with_other_settings_is_not_shown(
    overrides: list[str], agents: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    finished_folder(compose(overrides))
    assert main([*overrides, "seed=9"]) == 2
    printed = capsys.readouterr()
    assert "holds a run with other settings (seed: " in printed.err and "0.2500" not in printed.out
    assert main(overrides) == 0 and not agents
    assert "0.2500" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "2"], "--jobs: got 2 for a single run\n  mend: add --multirun, or leave it out"),
        (["doctor", "-m"], "doctor: takes no --multirun\n  mend: give the settings of one run"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    words: list[str], message: str, overrides: list[str], agents: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *overrides]) == 2
    assert message in capsys.readouterr().err and not agents


def test_a_finished_run_on_other_data_is_not_shown(
    overrides: list[str], agents: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose(overrides)
    folder = finished_folder(config)
    data = Path(config.data.path)
    known = DataIdentity.of(data, load_manifest(data), ())
    other = replace(known, files={}, made_from="sha256:0")
    folder.data_file.write_bytes(other.to_json())
    for more in ([], ["--multirun"]):
        assert main([*overrides, *more]) == 2
        printed = capsys.readouterr()
        assert "holds a run on other data than" in printed.err and "0.2500" not in printed.out
    folder.data_file.write_bytes(known.to_json())
    assert main(overrides) == 0 and not agents
    assert "0.2500" in capsys.readouterr().out


def test_a_run_that_goes_on_keeps_its_request_to_stop_and_its_settings(
    overrides: list[str],
    agents: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_folder, "_LEAVING_SECONDS", 0.1)
    folder = RunFolder(compose(overrides).run_dir)
    assert main(overrides) == 0 and len(agents) == 1
    settings = folder.launch_file.read_bytes()
    with folder.lock():
        folder.stop_file.touch()
        assert main([*overrides, "trainer.epochs=1"]) == 2
    assert "another process is training in it" in capsys.readouterr().err
    assert folder.stop_file.exists() and folder.launch_file.read_bytes() == settings and len(agents) == 1


def test_a_run_is_asked_about_from_anywhere(
    overrides: list[str],
    agents: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for place in (here, there):
        place.mkdir()
        monkeypatch.chdir(place)
        assert main([*overrides, "output=runs"]) == 0
    with RunFolder(here / "runs" / "tiny").lock():
        assert main(["cancel", "runs/tiny"]) == 2
        assert main(["cancel", str(here / "runs" / "tiny")]) == 0
    (there / "runs" / "tiny").rename(there / "runs" / "old")
    assert main(["cancel", "runs/old"]) == main(["cancel", str(here / "runs" / "tiny"), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "runs/old: holds the run tiny under another name" in said and "cancel: takes no options" in said
    assert (here / "runs" / "tiny" / "stop").exists() and not (there / "runs" / "tiny" / "stop").exists()


DOCUMENTED = re.findall(
    # what needs a plug-in of Hydra that is not ours is left out
    r"^python -m launch ((?!status|logs|cancel|.*hydra/sweeper=).*?)(?: *#.*)?$",
    (REPOSITORY / "docs" / "launch.md").read_text(),
    re.MULTILINE,
)


@pytest.mark.slow
@pytest.mark.parametrize("line", DOCUMENTED)
def test_documented_commands_say_what_they_would_start(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*shlex.split(line), "dry_run=true"]) == 0
    assert capsys.readouterr().out


def test_the_pages_of_all_kinds_are_there() -> None:
    page = (REPOSITORY / "docs" / "launch.md").read_text()
    assert len(DOCUMENTED) >= 6 and all(f"`cluster={kind}`" in page for kind in KINDS)


def test_a_stop_file_ends_a_run_with_a_code_of_its_own(
    overrides: list[str], agents: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(compose(overrides).run_dir)
    folder.path.mkdir(parents=True)
    # of an earlier run
    folder.stop_file.touch()
    assert main(overrides) == 0
    monkeypatch.setattr(local, "run", lambda command, environment, restarts: folder.stop_file.touch() or 0)
    assert main(overrides) == ExitCode.STOPPED
    assert not folder.stop_file.exists()


def test_questions_about_a_run(
    overrides: list[str], agents: list[list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(compose(overrides).run_dir)
    assert main(["status", str(folder.path)]) == 2
    assert f"error: {folder.path}: no run was launched here" in capfd.readouterr().err
    assert main(overrides) == 0
    assert main(["cancel", str(folder.path)]) == 2
    with folder.lock():
        assert main(["status", str(folder.path)]) == 0
        assert main(["cancel", str(folder.path)]) == 0
    assert folder.stop_file.exists()
    # one is being written
    for step, files in ((20, ["manifest.json"]), (30, ["manifest.json"]), (40, [])):
        (folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        for file in files:
            (folder.checkpoints / f"step-{step:08d}" / file).touch()
    assert main(["status", str(folder.path)]) == main(["logs", str(folder.path)]) == 0
    assert main(["logs"]) == 2
    printed = capfd.readouterr()
    expected = [
        "running; no checkpoint yet",
        "asked to save a checkpoint and stop",
        "not running; last checkpoint at step 30",
        "no logs in the run folder",
    ]
    assert [line.split(":")[0] for line in printed.out.splitlines()] == expected
    assert "logs: got 0 arguments" in printed.err


def test_help_names_options_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    printed = capsys.readouterr().out
    assert exit_.value.code == 0
    assert all(word in printed for word in ("dry_run=true", "nproc=N", "experiment  ", "cluster     hosts"))
