"""A sweep has one run a combination; cells that have finished are skipped, failed ones stop nobody and run alone."""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from hstu_dist.config import conf_dir
from hstu_dist.run_folder import RunFolder
from hydra_plugins.hstu_dist_launcher import HstuDistLauncher
from launch import multirun, slurm
from launch.__main__ import main
from launch.multirun import Cell, Sweep, fixed_settings, hand_to_sweeper
from launch.run_files import write_job
from tests.launch.runs import REPOSITORY, Started
from tests.scaling.cases import write_run
from tests.tiny import result_of, tiny_overrides


def cells_of(overrides: list[str]) -> list[Cell]:
    sweep = Sweep(fixed_settings(overrides), lambda config: config.name)
    hand_to_sweeper(overrides, None, sweep)
    return sweep.cells


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["seed=1"], [{}]),
        (["seed=1,2", "nproc=3"], [{"seed": "1"}, {"seed": "2"}]),
        (
            ["model=choice(hstu,sasrec)", "seed=range(1,3)"],
            [{"model": model, "seed": seed} for model in ("hstu", "sasrec") for seed in ("1", "2")],
        ),
        (["seed=1,2", "nproc=3", "seed=4"], [{}]),
        (
            ["optimizer.betas=[0.9,0.9],[0.9,0.98]"],
            [{"optimizer.betas": "[0.9,0.9]"}, {"optimizer.betas": "[0.9,0.98]"}],
        ),
    ],
)
def test_combinations_as_hydra_makes_them(overrides: list[str], expected: list[dict[str, str]]) -> None:
    cells = cells_of(["name=x", *overrides])
    assert [cell.swept for cell in cells] == expected
    given = [word for word in overrides if word.startswith("nproc=")]
    assert all(word in cell.overrides for word in given for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=interval(0,1)", "does not support sweep type"),
        ("seed=[1", "configuration: "),
        ("nonsense", "configuration: "),
        ("sed=1,2", "sed: no such key"),
        ("hydra/sweeper=unheard_of", "Could not find 'hydra/sweeper/unheard_of'"),
        ("hydra/launcher=basic", "hydra/launcher=basic: got a launcher"),
        ("hydra.launcher.jobs=0", "--jobs: got 0"),
    ],
)
def test_what_is_no_sweep(override: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "name=x", f"output={tmp_path}/runs", override]) == 2
    error, mend = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and expected in error and mend.startswith("  mend: ")


def test_the_launcher_is_for_runs_of_ours_only() -> None:
    with pytest.raises(HydraException, match="works with `python -m launch --multirun` only"):
        HstuDistLauncher(jobs=1).setup(hydra_context=None, task_function=print, config=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["name=x", "model.width=48,64", "seed=1,2"], ["x_width-48_seed-1", "x_width-48_seed-2", "x_width-64_seed-1"]),
        (["experiment=ml1m_hstu,ml1m_sasrec", "seed=3"], ["ml1m_hstu", "ml1m_sasrec"]),
        (["name=a,b", "seed=5"], ["a", "b"]),
        (
            ["name=x", "optimizer.learning_rate=0.1,0.2", "embedding.optimizer.learning_rate=0.3"],
            ["x_learning_rate-0.1", "x_learning_rate-0.2"],
        ),
        (
            ["name=x", "optimizer.eps=0.1,0.2", "embedding.optimizer.eps=0.3,0.4"],
            ["x_optimizer.eps-0.1_embedding.optimizer.eps-0.3"],
        ),
        (["name=x", "optimizer.betas=[0.9,0.9],[0.9,0.98]"], ["x_betas--0.9-0.9-", "x_betas--0.9-0.98-"]),
    ],
)
def test_a_run_is_named_after_what_it_varies(overrides: list[str], names: list[str]) -> None:
    cells = cells_of(overrides)
    assert [cell.config.name for cell in cells][: len(names)] == names
    assert all(f"name={cell.config.name}" in cell.overrides for cell in cells)


@pytest.mark.slow
def test_a_cell_that_is_asked_for_twice_starts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Cell] = []
    monkeypatch.setattr(multirun, "_start", started.append)
    words = ["experiment=ml1m", f"output={tmp_path}", "seed=2"]
    cells = Sweep({"experiment", "output"}, None).plan([words, words])
    assert multirun._work_off(cells, 4) is None
    assert len(cells) == 2 and [cell.config.seed for cell in started] == [2]


@pytest.mark.slow
def test_a_cell_that_a_scheduler_has_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Cell] = []
    monkeypatch.setattr(multirun, "_start", started.append)
    monkeypatch.setattr(slurm, "_state", lambda job: "RUNNING None" if job == "17" else None)
    words = ["name=x", "cluster=slurm", f"output={tmp_path}", "seed=1,2,3"]
    for name, job in (("x_seed-1", "17"), ("x_seed-2", "16")):
        write_job(RunFolder(tmp_path / name), job)
    assert main(["-m", *words]) == 1
    assert [cell.config.seed for cell in started] == [2, 3]
    rows = pq.read_table(tmp_path / "x_by_seed.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["submitted", "waiting", "waiting"]
    assert "submitted" in capsys.readouterr().out


def test_lines_to_start_by_hand_are_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["name=x", "cluster=hosts", "cluster.addresses=[gpu1,gpu2]", f"output={tmp_path}", "seed=1,2"]
    assert main(["-m", *words]) == 2
    assert "cluster.start: got print with --multirun" in capsys.readouterr().err
    assert main(["-m", *words, "dry_run=true"]) == 0
    assert capsys.readouterr().out.count("# on gpu2:") == 2


@pytest.mark.parametrize(
    ("code", "state"), [(-15, "stopped"), (143, "stopped"), (75, "stopped"), (1, "failed (1)"), (-9, "failed (-9)")]
)
def test_what_an_exit_code_means(code: int, state: str, tmp_path: Path) -> None:
    (cell,) = Sweep({"name", "output"}, None).plan([["name=x", f"output={tmp_path}", "seed=2"]])
    cell.process = cast(Any, SimpleNamespace(poll=lambda: code))
    assert cell.state == state


def test_a_bad_cell_is_refused_before_any_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "name=x", f"output={tmp_path}/runs", "model.width=48,0"]) == 2
    assert "model.width: " in capsys.readouterr().err
    assert main(["-m", "--jobs", "0", "name=x", "seed=1,2"]) == 2
    assert main(["-m", "name=x", "trainer.evaluation.monitor='hr@1','hr/1'"]) == 2
    # a sweeper's own record is no run
    assert {path.name for path in tmp_path.glob("runs/*")} <= {"multirun"}


CLIMBER = """
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

target = {"_target_": "hydra_plugins.climber.Climber"}
ConfigStore.instance().store(group="hydra/sweeper", name="climber", node=target)

class Climber(Sweeper):
    def setup(self, *, hydra_context, task_function, config):
        given = dict(hydra_context=hydra_context, task_function=task_function, config=config)
        self.launcher = Plugins.instance().instantiate_launcher(**given)

    def sweep(self, arguments):
        seed = 1
        for trial in range(3):
            (job,) = self.launcher.launch([[*arguments, f"seed={seed}"]], initial_job_idx=trial)
            seed = int(job.return_value)
"""


@pytest.mark.slow
def test_a_sweeper_that_searches_goes_by_the_validation_metric(tmp_path: Path) -> None:
    plugins = tmp_path / "plugins" / "hydra_plugins"
    plugins.mkdir(parents=True)
    (plugins / "climber.py").write_text(CLIMBER)
    # finished before, so that nothing starts; from 7 it comes back to 7
    for seed, value in ((1, 7.0), (7, 7.0)):
        folder = RunFolder(tmp_path / f"x_seed-{seed}")
        folder.path.mkdir()
        folder.finish({"epochs": 1, "validation": {"ndcg@10": value}, "test": {"ndcg@10": 0.5}})
    command = ["-m", "launch", "-m", "hydra/sweeper=climber", "name=x", f"output={tmp_path}", "trainer.epochs=1"]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'plugins'}:{REPOSITORY}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(tmp_path / "x_by_seed.parquet").to_pylist()
    assert [(row["run"], row["state"]) for row in rows] == [("x_seed-1", "finished"), ("x_seed-7", "finished")]


@pytest.mark.slow
def test_dry_run_shows_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "name=x", "cluster=slurm", "nodes=1,2", "dry_run=true"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("# x_nodes-1\n") < printed.index("#SBATCH --nodes=1") < printed.index("# x_nodes-2\n")
    assert "#SBATCH --nodes=2" in printed


@pytest.mark.slow
@pytest.mark.distributed
def test_a_failed_cell_stops_nobody_and_finished_ones_are_skipped(tiny_data: Path, tmp_path: Path) -> None:
    overrides = [*tiny_overrides(tiny_data, tmp_path), "trainer.threads=1", "trainer.epochs=1"]
    overrides = ["nproc=1" if word.startswith("nproc=") else word for word in overrides]
    # a file in the place of its folder
    broken = tmp_path / "tiny_seed-1"
    broken.write_text("in the way")
    command = ["-m", "launch", "--multirun", "--jobs=2", *overrides, "seed=1,2,3"]
    with Started(command, tmp_path / "printed") as process:
        first = process.wait()
    assert first.code == 1, first.err
    states = {row["run"]: row["state"] for row in pq.read_table(tmp_path / "tiny_by_seed.parquet").to_pylist()}
    assert states == {"tiny_seed-1": "failed (2)", "tiny_seed-2": "finished", "tiny_seed-3": "finished"}
    assert "cannot be written" in (tmp_path / "tiny_seed-1.log").read_text()
    alone = next(line.partition("alone: python ")[2] for line in first.out.splitlines() if "alone: " in line)

    broken.unlink()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny_seed-2").rglob("*")}
    with Started(shlex.split(alone), tmp_path / "alone") as process:
        assert process.wait().code == 0
    with Started(command, tmp_path / "printed") as process:
        again = process.wait()
    assert again.code == 0 and again.out.count("finished") == 3 and "started" not in again.out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny_seed-2").rglob("*")} == written

    rows = pq.read_table(tmp_path / "tiny_by_seed.parquet").to_pylist()
    assert [row["seed"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        test = result_of(tmp_path / row["run"])["test"]
        assert {name: row[f"test/{name}"] for name in test} == test
        assert f"{test['ndcg@10']:.4f}" in again.out


@pytest.mark.slow
def test_the_cost_is_said_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "--dry-run", "+sweep=scaling", "size=s01,s02", "experiment=scaling_hstu"]) == 0
    first, *cells = capsys.readouterr().out.splitlines()
    assert first == "1.14e+11 training FLOPs in 2 cells; 0 are done"
    assert cells[:2] == ["  scaling_hstu_size-s01: 3e+10", "  scaling_hstu_size-s02: 8.41e+10"]


@pytest.mark.slow
def test_settings_with_keys_of_the_users_own_are_swept_too() -> None:
    metrics = "trainer.evaluation.metrics={rlr: 'examples.own_parts:reciprocal_log_rank'}"
    cells = cells_of(["experiment=ml1m", "seed=1,2", "plugins=[examples.own_parts]", metrics])
    assert [list(cell.config.trainer.evaluation.metrics) for cell in cells] == [["rlr"], ["rlr"]]
    assert [cell.swept for cell in cells] == [{"seed": "1"}, {"seed": "2"}]


@pytest.mark.slow
def test_the_ladder_has_two_seeds_of_its_small_half() -> None:
    cells = cells_of(["+sweep=scaling"])
    names = {cell.config.name for cell in cells}
    assert len(names) == 24 and {cell.config.output for cell in cells} == {"runs/scaling"}
    assert {f"scaling_hstu_size-s0{rung}_seed2" for rung in range(1, 5)} < names
    sizes = OmegaConf.load(conf_dir() / "sweep" / "isoflop.yaml").hydra.sweeper.params.values()
    assert math.prod(len(values.split(",")) for values in sizes) == 16


@pytest.mark.slow
def test_a_finished_cell_with_other_settings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "scaling_hstu", "s01")
    command = ["-m", "experiment=scaling_hstu", "size=s01", f"output={tmp_path}", "name=scaling_hstu_s01"]
    assert main([*command, "--dry-run"]) == 0
    assert "0 training FLOPs in 0 cells; 1 are done" in capsys.readouterr().out
    assert main([*command, "optimizer.learning_rate=0.7"]) == 2
    assert "scaling_hstu_s01: has finished with other settings (optimizer.learning_rate: 0.01 -> 0.7)" in (
        capsys.readouterr().err
    )
