"""The scaling benchmark: what its summary says of fits whose laws are known, and a whole quick sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from hstu_dist.report.results import load
from tests.scaling.cases import LAWS, write_run, write_sweep


def measured_by(commit: str, sweep: Path) -> None:
    """Leaves in every run folder what a rank writes about its machine."""
    for run in sweep.glob("*/config.yaml"):
        (run.parent / "environment.json").write_text(json.dumps({"commit": commit}))


def test_laws_predictions_and_the_gap_to_the_baseline(tmp_path: Path) -> None:
    write_sweep(tmp_path / "scaling")
    measured_by("abc-dirty", tmp_path / "scaling")
    arguments = ["--sweeps", "scaling", "--finished", "--runs", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(["scaling", *arguments]) == 0
    found = load("scaling_law", tmp_path / "out")
    assert found.commit == "abc+changes"
    assert found.value("scaling", "scaling_hstu", "E") == pytest.approx(LAWS["scaling_hstu"].floor, rel=0.01)
    assert found.value("scaling, held out", "scaling_hstu", "error") == pytest.approx(0, abs=1e-3)
    gaps = {(ratio.case, ratio.metric): ratio for ratio in found.ratios if ratio.case.endswith("FLOPs")}
    assert {case for case, _ in gaps} == {"scaling, 1e11 FLOPs", "scaling, 1e12 FLOPs"}
    expected = LAWS["scaling_sasrec"].at(1e12) / LAWS["scaling_hstu"].at(1e12)  # type: ignore[arg-type,operator]
    assert gaps["scaling, 1e12 FLOPs", "loss"].value == pytest.approx(expected, rel=1e-3)
    assert all(ratio.met for ratio in found.ratios)
    for metric in ("loss", "hr_at_10"):
        assert (tmp_path / "out" / "scaling" / "scaling" / f"{metric}.svg").stat().st_size > 500


def test_runs_of_several_commits_are_not_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path / "scaling")
    measured_by("abc", tmp_path / "scaling")
    config = write_run(tmp_path / "scaling", "scaling_hstu", "s07")
    (config.run_dir / "environment.json").write_text(json.dumps({"commit": "def"}))
    arguments = ["--sweeps", "scaling", "--finished", "--runs", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(["scaling", *arguments]) == 2
    assert "runs of abc, def: trained by 2 commits" in capsys.readouterr().err
    assert not (tmp_path / "out" / "scaling_law.json").exists()


@pytest.mark.long
def test_a_quick_sweep(tmp_path: Path) -> None:
    arguments = ["--quick", "--sweeps", "scaling", "--jobs", "2", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["scaling", *arguments]) == 0
    assert load("scaling_law", tmp_path).rows
