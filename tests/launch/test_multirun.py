"""A sweep has one run a combination; cells that have finished are skipped, failed ones stop nobody and run alone."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hstu_dist.config import sweep
from hstu_dist.errors import UserError
from launch.__main__ import main
from launch.multirun import plan
from tests.launch.runs import Started
from tests.tiny import result_of, tiny_overrides


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["a=1"], [{"a": "1"}]),
        (["a=1,2", "b=x"], [{"a": "1", "b": "x"}, {"a": "2", "b": "x"}]),
        (
            ["a.b=choice(p,q)", "c=range(1,3)"],
            [{"a.b": "p", "c": "1"}, {"a.b": "p", "c": "2"}, {"a.b": "q", "c": "1"}, {"a.b": "q", "c": "2"}],
        ),
        (["a=1,2", "b=3", "a=4"], [{"a": "4", "b": "3"}]),
        (["l=[1,2]", "+n=null", "s='a,b'"], [{"l": "[1,2]", "+n": "null", "s": "'a,b'"}]),
    ],
)
def test_combinations_as_hydra_makes_them(overrides: list[str], expected: list[dict[str, str]]) -> None:
    assert sweep(overrides) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["a=interval(0,1)"], "not a finite number of values"),
        (["a=[1"], "configuration: "),
        (["nonsense"], "configuration: "),
    ],
)
def test_what_is_no_sweep(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        sweep(overrides)
    assert expected in caught.value.problem and "\n" not in str(caught.value)


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
    cells = plan(overrides)
    assert [cell.config.name for cell in cells][: len(names)] == names
    assert all(f"name={cell.config.name}" in cell.overrides for cell in cells)


def test_a_bad_cell_is_refused_before_any_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "name=x", f"output={tmp_path}/runs", "model.width=48,0"]) == 2
    assert "model.width: " in capsys.readouterr().err
    assert main(["-m", "--jobs", "0", "name=x", "seed=1,2"]) == 2
    assert main(["-m", "name=x", "trainer.evaluation.monitor='hr@1','hr/1'"]) == 2
    assert not (tmp_path / "runs").exists()


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
    with Started(alone.split(), tmp_path / "alone") as process:
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
