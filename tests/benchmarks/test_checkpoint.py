"""The checkpoint benchmark: what counts against the targets, and a whole run on a small table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.checkpoint import ratios_of, rows_of
from benchmarks.checkpoint_worker import Answer
from hstu_dist.report import results

ANSWER = Answer(
    bytes=10**9,
    seconds={
        "plain write": [1.0, 1.0, 4.0],
        "synchronous save": [2.0, 1.0, 2.0],
        "asynchronous save": [3.0, 3.0, 3.0],
        "stall": [0.1, 0.1, 0.4],
        "plain read": [0.5, 0.5, 0.5],
        "load": [1.0, 2.0, 2.0],
    },
)


def test_ratios_are_taken_round_by_round() -> None:
    ratios = {ratio.metric: ratio for ratio in ratios_of("1 GB", ANSWER)}
    # 20, 10 and 5 times the stall
    assert ratios["stall"].value == pytest.approx(1.0) and ratios["stall"].met
    assert ratios["write rate"].value == 1.0 and ratios["write rate"].target == 0.5
    assert ratios["read rate"].value == 0.25 and not ratios["read rate"].met
    rows = {(row.contender, row.metric): row.value for row in rows_of("1 GB", ANSWER)}
    assert rows["synchronous", "write"] == 2.0 and rows["asynchronous", "stall"] == 0.1
    assert len(rows) == len(ANSWER.seconds)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_measure_a_small_table(tmp_path: Path) -> None:
    arguments = ["checkpoint", "--quick", "--output", str(tmp_path / "results"), "--folder", str(tmp_path / "disk")]
    assert main(arguments) == 0
    found = results.load("checkpoint", tmp_path / "results")
    assert all(row.value > 0 for row in found.rows) and len(found.ratios) == 3
    # gigabytes must not stay behind
    assert list((tmp_path / "disk").iterdir()) == []
