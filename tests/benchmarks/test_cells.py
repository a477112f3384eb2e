"""Cells of a long measurement are measured once, unless something they depend on changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cells import Cells, Findings
from benchmarks.environment import source_hash
from benchmarks.harness import Samples
from hstu_dist.report.results import Ratio

FOUND = Findings(
    rows=[Samples((1.0, 2.0)).row("c", "x", "time", "s")],
    ratios=[Ratio(case="c", metric="m", a="x", b="y", value=2.0, target=1.0)],
    refused=["y: wrong"],
)


def test_a_finished_cell_is_not_measured_again(tmp_path: Path) -> None:
    assert Cells(tmp_path, {"code": "1"}).measure("cell", lambda: FOUND) == FOUND

    def again() -> Findings:
        raise AssertionError("measured twice")

    assert Cells(tmp_path, {"code": "1"}).measure("cell", again) == FOUND


@pytest.mark.parametrize("damage", ["", "{", '{"stamp": {"code": "1"}}'])
def test_another_stamp_or_a_damaged_file_is_measured_again(tmp_path: Path, damage: str) -> None:
    Cells(tmp_path, {"code": "1"}).measure("cell", lambda: FOUND)
    assert Cells(tmp_path, {"code": "2"}).measure("cell", Findings) == Findings()
    (tmp_path / "cell.json").write_text(damage)
    assert Cells(tmp_path, {"code": "1"}).measure("cell", lambda: FOUND) == FOUND


def test_a_cell_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Findings:
        raise KeyboardInterrupt

    cells = Cells(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        cells.measure("cell", failing)
    assert not list(tmp_path.iterdir())
    cells.measure("cell", lambda: FOUND)
    cells.clear()
    assert not tmp_path.exists()


def test_the_stamp_of_the_code_is_stable() -> None:
    assert source_hash() == source_hash() and len(source_hash()) == 64
