"""Cells that are measured are skipped, means are over seeds, and a ratio above 1 always means that HSTU is better."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import ranking
from benchmarks.__main__ import main
from benchmarks.ranking_cells import AVERAGES, CASE, Cell, is_current, write_cell, write_summary
from benchmarks.study_cells import Run
from hstu_dist.config import RunConfig, compose
from hstu_dist.report.results import load

STUDY = ranking.Study(settings=("nproc=1",), runs=Path("runs"), output=Path("unused"), command="test")


def config_of(cell: Cell) -> RunConfig:
    return compose(STUDY.overrides(cell))


def run_of(cell: Cell, ne: float, auc: float) -> Run:
    result = {
        "epochs": 4,
        "best_epoch": 3,
        "dense_parameters": 1000,
        "test": {"like/ne": ne, "like/auc": auc, "like/gauc": auc - 0.1},
        "popularity": {"like/ne": 0.9, "like/auc": 0.7, "like/gauc": 0.7},
        "speed": {"train_seconds": 10.0, "training_flops": 8e12},
    }
    return Run(config_of(cell), result, {"commit": "abc"}, [])


@pytest.mark.slow
def test_every_contender_composes_and_has_a_name_of_its_own() -> None:
    cells = [Cell(contender, 1) for contender in (*ranking.MAIN, *ranking.ABLATIONS)]
    assert len({cell.stem for cell in cells}) == len(cells)
    settings = [replace(config_of(cell), name="same") for cell in cells]
    assert all(a != b for i, a in enumerate(settings) for b in settings[:i])
    assert all(config.task.kind == "ranking" for config in settings)


@pytest.mark.slow
def test_means_ratios_and_what_is_current(tmp_path: Path) -> None:
    figures = {
        Cell("hstu", 1): (0.80, 0.78),
        Cell("hstu", 2): (0.82, 0.80),
        Cell("dlrm", 1): (0.90, 0.75),
        Cell("dlrm", 2): (0.90, 0.77),
    }
    for cell, (ne, auc) in figures.items():
        assert not is_current(cell, tmp_path, config_of(cell))
        write_cell(cell, run_of(cell, ne, auc), tmp_path, "test")
        assert is_current(cell, tmp_path, config_of(cell))
        assert not is_current(cell, tmp_path, replace(config_of(cell), seed=cell.seed + 1))
    contenders = (*ranking.MAIN, *ranking.ABLATIONS)
    summary = write_summary(contenders, tmp_path, "test", config_of)
    assert load("ranking", tmp_path) == summary
    assert summary.value(CASE, "hstu", "like/auc") == pytest.approx(0.79)
    assert summary.value(CASE, AVERAGES, "like/ne") == pytest.approx(0.9)
    assert summary.value(CASE, "hstu", "training TFLOP an epoch") == 2.0
    ratios = {ratio.metric: ratio for ratio in summary.ratios}
    assert set(ratios) == {f"{m}, mean of 2 seeds" for m in ("like/auc", "like/gauc", "like/ne, inverted")}
    assert ratios["like/auc, mean of 2 seeds"].value == pytest.approx(0.79 / 0.76)
    assert ratios["like/ne, inverted, mean of 2 seeds"].value == pytest.approx(0.90 / 0.81)
    assert all(ratio.met in (True, None) for ratio in summary.ratios)
    # one more seed, of one of them
    write_cell(Cell("hstu", 4), run_of(Cell("hstu", 4), 0.81, 0.85), tmp_path, "test")
    summary = write_summary(contenders, tmp_path, "test", config_of)
    assert summary.value(CASE, "hstu", "like/auc") == pytest.approx(0.81)
    assert {ratio.metric for ratio in summary.ratios} >= {"like/auc, means of 3 and 2 seeds"}


@pytest.mark.long
def test_a_quick_study_runs_and_then_skips_everything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = ["ranking", "--quick", "--seeds", "1", "--nproc", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert main(command) == 0
    names = {path.stem for path in (tmp_path / "ranking").glob("*.json")}
    assert names == {Cell(c, 1).stem for c in (*ranking.MAIN, *ranking.ABLATIONS)}
    before = (tmp_path / "ranking.json").read_bytes()
    caplog.clear()
    with caplog.at_level("INFO"):
        assert main(command) == 0
    assert sum("already measured" in message for message in caplog.messages) == len(names)
    assert (tmp_path / "ranking.json").read_bytes() == before
