"""The scaling benchmark: what its summary says of fits whose laws are known, and a whole quick sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from hstu_dist.report.results import load
from tests.scaling.cases import LAWS, write_sweep


def remember_environments(sweep: Path) -> None:
    """Leaves in every run folder what a rank writes about its machine; those of the largest size are the newest."""
    for run in sweep.glob("*/config.yaml"):
        day, commit = (2, "abc-dirty") if "s06" in run.parent.name else (1, "def")
        environment = {"date": f"2026-11-0{day}T00:00:00+00:00", "commit": commit}
        (run.parent / "environment.json").write_text(json.dumps(environment))


@pytest.mark.slow
def test_laws_predictions_and_the_gap_to_the_baseline(tmp_path: Path) -> None:
    write_sweep(tmp_path / "scaling")
    remember_environments(tmp_path / "scaling")
    arguments = ["--sweeps", "scaling", "--finished", "--runs", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(["scaling", *arguments]) == 0
    found = load("scaling_law", tmp_path / "out")
    assert (found.date, found.commit) == ("2026-11-02T00:00:00+00:00", "abc+changes")
    points = json.loads((tmp_path / "out" / "scaling" / "scaling" / "loss.json").read_text())["points"]
    assert {point["commit"] for point in points} == {"abc-dirty", "def"}
    assert found.value("scaling", "scaling_hstu", "E") == pytest.approx(LAWS["scaling_hstu"].floor, rel=0.01)
    assert found.value("scaling, held out", "scaling_hstu", "error") == pytest.approx(0, abs=1e-3)
    gaps = {(ratio.case, ratio.metric): ratio for ratio in found.ratios if ratio.case.endswith("FLOPs")}
    assert {case for case, _ in gaps} == {"scaling, 1e11 FLOPs", "scaling, 1e12 FLOPs"}
    expected = LAWS["scaling_sasrec"].at(1e12) / LAWS["scaling_hstu"].at(1e12)  # type: ignore[arg-type,operator]
    assert gaps["scaling, 1e12 FLOPs", "loss"].value == pytest.approx(expected, rel=1e-3)
    assert all(ratio.met for ratio in found.ratios)
    for metric in ("loss", "hr_at_10"):
        assert (tmp_path / "out" / "scaling" / "scaling" / f"{metric}.svg").stat().st_size > 500


@pytest.mark.long
def test_a_quick_sweep(tmp_path: Path) -> None:
    arguments = ["--quick", "--sweeps", "scaling", "--jobs", "2", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["scaling", *arguments]) == 0
    assert load("scaling_law", tmp_path).rows
