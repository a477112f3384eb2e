"""The prepare command: settings in, a data set with its plot out."""

from __future__ import annotations

from pathlib import Path

import pytest

from hstu_dist.commands.prepare import prepare_data
from hstu_dist.config import compose_dict
from hstu_dist.errors import UserError
from tests.data.cases import write_log


def run(tmp_path: Path, *overrides: str) -> list[str]:
    log = write_log(tmp_path / "log.csv", {"user": [1, 2, 1, 1], "item": [5, 5, 6, 7], "time": [1, 2, 3, 4]})
    names = [f"data.{name}_column={name}" for name in ("user", "item")]
    settings = [
        "data=events",
        f"data.input={log}",
        f"data.path={tmp_path / 'set'}",
        "data.timestamp_column=time",
        *names,
    ]
    said: list[str] = []
    prepare_data(compose_dict("prepare", [*settings, *overrides]), said.append)
    return said


@pytest.mark.slow
def test_a_data_set_with_a_plot_of_lengths(tmp_path: Path) -> None:
    said = run(tmp_path, "engine=duckdb", "memory_gib=1")
    plot = tmp_path / "set" / "lengths.png"
    assert said == [
        f"{tmp_path / 'set'}: 2 users, 3 items, 4 events, sequences of 2.0 events on average, 3 at most; "
        f"lengths: {plot}"
    ]
    before = plot.stat().st_mtime_ns
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run(tmp_path, "memory_gib=2") == said and plot.stat().st_mtime_ns == before
    # replaced with the data set
    assert "2 events" in run(tmp_path, "data.min_item_events=2")[0] and plot.stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine=polars", "engine: Input should be 'duckdb' or 'spark'"),
        ("memory_gib=0.5", "memory_gib: Input should be greater than or equal to 0.75"),
    ],
)
def test_bad_settings(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, override)
    assert not (tmp_path / "set").exists()
