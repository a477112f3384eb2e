"""The preparation benchmark: logs of the wanted size, ratios against limits, growth by size, and a whole quick run."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks import prepare
from benchmarks.__main__ import main
from benchmarks.prepare import Measured, Setting
from hstu_dist.report import results


def test_a_log_has_as_many_events_as_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_EVENTS_PER_FILE", 4000)
    prepare.make_log(tmp_path, 10_000)
    tables = [pq.read_table(file) for file in sorted((tmp_path / "10000").iterdir())]
    assert [len(table) for table in tables] == [4000, 4000, 2000]
    times = [table["timestamp"].to_pylist() for table in tables]
    assert all(day == sorted(day) for day in times) and times[0][-1] < times[1][0]


def test_limits_and_growth() -> None:
    setting = Setting(100, 1.0, seconds=60, bytes=4e9)
    _, ratios = prepare._of_preparation(setting, Measured(40.0, 5e9, ""))
    assert [(ratio.metric, ratio.value, ratio.met) for ratio in ratios] == [
        ("time", 1.5, True),
        ("peak memory", 0.8, False),
    ]
    settings = tuple(Setting(10**power, 1.0) for power in range(3, 6))
    measured = {setting: Measured(float(setting.events) ** 1.1, 1.0, "") for setting in settings}
    row = prepare._growth((Setting(7, 2.0), *settings), {**measured, Setting(7, 2.0): Measured(99.0, 1.0, "")})
    assert row.value == pytest.approx(1.1)


@pytest.mark.long
def test_a_quick_run(tmp_path: Path) -> None:
    assert main(["prepare", "--quick", "--output", str(tmp_path), "--logs", str(tmp_path / "logs")]) == 0
    found = results.load("prepare", tmp_path)
    assert {row.metric for row in found.rows} == {"time", "peak memory", "events", "growth of time"}
    assert all(ratio.met for ratio in found.ratios if ratio.metric == "peak memory")
