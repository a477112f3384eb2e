"""The MovieLens-1M study: cells are measured once, summaries are the means of what matches the present settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ml1m, ml1m_cells
from benchmarks.__main__ import main
from benchmarks.ml1m_cells import CHOSEN, HELD_OUT, REFERENCE, REFIT, Cell, is_current, write_cell, write_summary
from benchmarks.study_cells import Run
from hstu_dist.config import RunConfig, compose, difference
from hstu_dist.errors import UserError
from hstu_dist.report import results

HERE = {"commit": "0" * 40}


def config_of(cell: Cell, *more: str) -> RunConfig:
    return compose([f"experiment=ml1m_{cell.experiment}", f"seed={cell.seed}", *more])


def result(hr: float, **more: Any) -> dict[str, Any]:
    speed = {"train_seconds": 60.0, "evaluation_seconds": 6.0}
    metrics = {"hr@10": hr, "ndcg@10": hr / 2}
    return {"epochs": 2, "steps": 8, "test": metrics, "popularity": metrics, "world_size": 2, "speed": speed, **more}


def cell_runs(cell: Cell, hr: float) -> tuple[Run, Run]:
    tracked = {"reference_protocol": {"best_epoch": 2, "test": {"hr@10": hr + 0.2}}}
    log = [
        {"step": 2, "train/loss": 5.0},
        {"step": 4, "train/loss": 3.0},
        {"step": 4, "validation/ndcg@10": 0.1, "validation/hr@10": 0.2, "validation/mrr": 0.3},
        {"step": 6, "train/loss": 2.0},
        {"step": 8, "validation/ndcg@10": 0.3, "validation/hr@10": 0.4},
    ]
    chosen = Run(config_of(cell), result(hr, best_epoch=1, **tracked), HERE, log)
    return chosen, Run(config_of(cell), result(hr + 0.1), HERE, [])


def test_a_cell_holds_every_protocol_and_the_learning_curve(tmp_path: Path) -> None:
    cell = Cell("hstu", 2)
    write_cell(cell, cell_runs(cell, 0.25), tmp_path, "python -m benchmarks ml1m")
    found = results.load("ml1m/hstu_seed2", tmp_path)
    assert found.value("hstu", CHOSEN, "hr@10") == 0.25 and found.value("hstu", REFIT, "ndcg@10") == 0.35 / 2
    assert found.value("hstu", HELD_OUT, "hr@10") == 0.45 and found.value("hstu", CHOSEN, "best epoch") == 1
    assert found.value("hstu", REFIT, "train_seconds") == 60.0
    # the refit of these figures was not tracked
    assert not [row for row in found.rows if row.contender == REFERENCE]
    curve = {(row.case, row.metric): row.value for row in found.rows if row.case.startswith("epoch ")}
    assert curve == {
        ("epoch 1", "loss"): 4.0,
        ("epoch 2", "loss"): 2.0,
        ("epoch 1", "ndcg@10"): 0.1,
        ("epoch 1", "hr@10"): 0.2,
        ("epoch 2", "ndcg@10"): 0.3,
        ("epoch 2", "hr@10"): 0.4,
    }
    assert found.commit == "0" * 40 and found.threads >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "current"),
    [
        ("nproc=1", True),
        ("trainer.threads=2", True),
        ("name=elsewhere", True),
        ("data.path=elsewhere", True),
        ("trainer.epochs=100", False),
        ("model.dropout=0.1", False),
        ("seed=3", False),
    ],
)
def test_a_cell_counts_as_long_as_what_decides_its_figures_is_the_same(
    override: str, current: bool, tmp_path: Path
) -> None:
    cell = Cell("hstu", 2)
    assert not is_current(cell, tmp_path, config_of(cell))
    write_cell(cell, cell_runs(cell, 0.25), tmp_path, "python -m benchmarks ml1m")
    assert is_current(cell, tmp_path, config_of(cell))
    assert is_current(cell, tmp_path, config_of(cell, override)) == current


def test_settings_that_came_later_have_their_defaults_in_older_cells(tmp_path: Path) -> None:
    cell = Cell("hstu", 2)
    write_cell(cell, cell_runs(cell, 0.25), tmp_path, "python -m benchmarks ml1m")
    measured = results.load(cell.name, tmp_path)
    for change, current in (("concat_ux", True), ("gone", False)):
        settings = json.loads(measured.versions["configuration"])
        settings["model"].pop(change, None) if current else settings["model"].update({change: 1})
        versions = {**measured.versions, "configuration": json.dumps(settings)}
        results.write(replace(measured, versions=versions), tmp_path)
        assert is_current(cell, tmp_path, config_of(cell)) == current


@pytest.mark.slow
def test_the_summary_is_the_mean_of_the_cells_that_exist(tmp_path: Path) -> None:
    for seed, hr in ((1, 0.30), (2, 0.31), (3, 0.35)):
        cell = Cell("hstu", seed)
        write_cell(cell, cell_runs(cell, hr), tmp_path, "python -m benchmarks ml1m")
    # measured with other settings: left out
    other = Cell("sasrec", 1)
    chosen, refit = cell_runs(other, 0.9)
    stale = replace(chosen, config=config_of(other, "model.dropout=0.5"))
    write_cell(other, (stale, refit), tmp_path, "python -m benchmarks ml1m")

    summary = write_summary(ml1m.EXPERIMENTS, tmp_path, "make results", config_of)
    assert results.load("ml1m", tmp_path) == summary and "configuration" not in summary.versions
    assert {row.case for row in summary.rows} == {"hstu"}
    (row,) = (r for r in summary.rows if (r.contender, r.metric) == (CHOSEN, "hr@10"))
    assert (row.n, row.value, row.q25, row.q75) == pytest.approx((3, 0.32, 0.305, 0.33))
    assert summary.value("hstu", "published", "hr@10") == 0.3097
    verdicts = {ratio.a: (ratio.value, ratio.target, ratio.met) for ratio in summary.ratios}
    assert verdicts[CHOSEN] == (pytest.approx(0.32), 0.309, True)
    assert verdicts[REFIT] == (pytest.approx(0.42), 0.309, True)
    before = (tmp_path / "ml1m.json").read_bytes()
    write_summary(ml1m.EXPERIMENTS, tmp_path, "make results", config_of)
    assert (tmp_path / "ml1m.json").read_bytes() == before
    with pytest.raises(UserError, match="got no cell of the present settings"):
        write_summary(["sasrec"], tmp_path, "make results", config_of)


@pytest.mark.slow
def test_every_experiment_but_the_ablation_has_published_figures_and_a_target() -> None:
    for experiment in ml1m.EXPERIMENTS:
        config = config_of(Cell(experiment, 1))
        assert set(ml1m_cells.TARGETS.get(experiment, {})) <= set(config.published)
        assert config.trainer.evaluation.track_test and config.embedding.optimizer.kind == "adamw"
    assert set(ml1m.EXPERIMENTS) - set(ml1m_cells.TARGETS) == {"hstu_no_bias"}


def test_the_ablation_differs_in_the_bias_alone() -> None:
    without, whole = config_of(Cell("hstu_no_bias", 1)), config_of(Cell("hstu", 1))
    changed = [line.split(":")[0] for line in difference(without, whole)]
    assert changed == ["model.relative_bias", "name"]


def test_a_refit_of_another_length_is_refused(tmp_path: Path) -> None:
    config = config_of(Cell("hstu", 1), f"output={tmp_path}", "trainer.stop_epoch=7")
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "result.json").write_text(json.dumps({"epochs": 9, "stopped_early": False}))
    with pytest.raises(UserError, match=r"holds a run of 9 epochs, expected 7 -> remove the folder"):
        Run.read(config)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_whole_study_in_miniature(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["ml1m", "--quick", "--output", str(tmp_path), "--seeds", "1", "--experiments", "hstu", "--nproc", "1"]
    command += ["--threads", "1", "--device", "cpu"]
    assert main(command) == 0
    cell = results.load("ml1m/hstu_seed1", tmp_path)
    chosen, refit = ("ml1m_runs/hstu_seed1", "ml1m_runs/hstu_seed1_refit")
    first, second = (json.loads((tmp_path / run / "result.json").read_text()) for run in (chosen, refit))
    assert second["train_on"] == "train_validation" and second["epochs"] == first["best_epoch"]
    assert cell.value("hstu", REFIT, "hr@10") == second["test"]["hr@10"]
    assert cell.value("hstu", REFERENCE, "hr@10") == second["reference_protocol"]["test"]["hr@10"]
    # the runs are gone, the cell is not
    for run in (chosen, refit):
        (tmp_path / run / "result.json").unlink()
    before = {path: path.read_bytes() for path in tmp_path.glob("ml1m*/*.json")} | {
        tmp_path / "ml1m.json": (tmp_path / "ml1m.json").read_bytes()
    }
    capfd.readouterr()
    assert main(command) == 0
    assert "metric" not in capfd.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())
