"""Result files keep one schema, are replaced whole, and their tables show what was missed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from hstu_dist.errors import UserError
from hstu_dist.report import plots, results
from hstu_dist.report.results import Ratio, Results, Row
from hstu_dist.report.tables import ratios_table, rows_table


def row(contender: str = "native", metric: str = "forward", **changes: object) -> Row:
    values = {"value": 2.0, "unit": "ms", "n": 5, "q25": 1.5, "q75": 2.5} | changes
    return Row(case="B2 N8", contender=contender, metric=metric, **values)  # type: ignore[arg-type]


def sample(name: str = "attention_cpu") -> Results:
    met, missed = (
        Ratio(case="B2 N8", metric="forward rate", a="native", b=b, value=v, target=2.0)
        for b, v in (("blocked", 2.5), ("sdpa", 1.25))
    )
    noise = Ratio(case="B2 N8", metric="forward rate", a="native", b="native again", value=1.01)
    return Results(
        name=name,
        command="python -m benchmarks attention",
        date="2000-01-01T00:00:00+00:00",
        commit="0" * 40,
        device="test chip",
        threads=2,
        versions={"python": "3.11"},
        rows=(row(), row("blocked", value=150.4), row(metric="peak extra memory", unit="MB", n=1)),
        ratios=(met, missed, noise),
    )


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    path = results.write(sample("scaling/width"), tmp_path)
    assert path == tmp_path / "scaling" / "width.json"
    assert results.load("scaling/width", tmp_path) == sample("scaling/width")


def test_the_schema_is_the_documented_one(tmp_path: Path) -> None:
    raw = json.loads(results.write(sample(), tmp_path).read_text())
    assert list(raw) == ["name", "command", "date", "commit", "device", "threads", "versions", "rows", "ratios"]
    assert list(raw["rows"][0]) == ["case", "contender", "metric", "value", "unit", "n", "q25", "q75"]
    assert list(raw["ratios"][0]) == ["case", "metric", "a", "b", "value", "target"]
    assert raw["ratios"][2]["target"] is None


def test_a_file_has_one_figure_a_line(tmp_path: Path) -> None:
    lines = results.write(sample(), tmp_path).read_text().splitlines()
    assert sum('"contender"' in line for line in lines) == len(sample().rows)
    assert len(lines) == 2 + 9 + 2 + len(sample().rows) + len(sample().ratios)
    assert results.load("attention_cpu", tmp_path) == sample()


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda raw: raw.update(gpu="x"), "gpu"),
        (lambda raw: raw.pop("commit"), "commit"),
        (lambda raw: raw["rows"][0].update(n=0), "rows.0.n"),
        (lambda raw: raw["rows"][0].update(q25=9.0), "q25 <= q75"),
        (lambda raw: raw["ratios"][0].update(value="fast"), "ratios.0.value"),
        (lambda raw: raw.update(name="../escape"), "name"),
    ],
)
def test_a_file_outside_the_schema_is_refused(tmp_path: Path, damage, field: str) -> None:
    path = results.write(sample(), tmp_path)
    raw = json.loads(path.read_text())
    damage(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=field):
        results.load("attention_cpu", tmp_path)


def test_a_missing_or_cut_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        results.load("attention_cpu", tmp_path)
    (tmp_path / "attention_cpu.json").write_text('{"name": "attention')
    with pytest.raises(UserError, match="attention_cpu"):
        results.load("attention_cpu", tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_no_number_cannot_be_recorded(value: float) -> None:
    with pytest.raises(ValidationError):
        row(value=value)


def test_a_ratio_meets_its_target_from_there_upwards() -> None:
    assert [ratio.met for ratio in sample().ratios] == [True, False, None]
    at_target = Ratio(case="c", metric="m", a="a", b="b", value=2.0, target=2.0)
    assert at_target.met


def test_tables_show_every_row_and_every_miss() -> None:
    table = rows_table(sample()).splitlines()
    assert table[0] == "| case | contender | forward (ms) | peak extra memory (MB) |"
    assert table[2] == "| B2 N8 | native | 2 (1.5 to 2.5) | 2 |"
    assert table[3] == "| B2 N8 | blocked | 150 (1.5 to 2.5) |  |"
    ratios = ratios_table(sample()).splitlines()
    assert ratios[3] == "| B2 N8 | forward rate | native / sdpa | 1.25 | 2 | **missed** |"
    assert len(ratios) == 2 + 3
    assert "native again" in ratios[4]
    assert "blocked" not in rows_table(sample(), ("peak extra memory",))
    # hit rates differ in the third decimal
    rates = replace(
        sample(), rows=(row(value=0.28534, unit="1", n=1),), ratios=(replace(sample().ratios[0], value=0.28534),)
    )
    assert "| 0.2853 |" in rows_table(rates) and "| 0.2853 |" in ratios_table(rates)


def test_one_figure_is_found_by_name() -> None:
    assert sample().value("B2 N8", "native", "forward") == 2.0
    with pytest.raises(KeyError, match="triton"):
        sample().value("B2 N8", "triton", "forward")


def test_plots_are_written_in_both_forms_and_do_not_change_by_themselves(tmp_path: Path) -> None:
    first = plots.save_bars(sample(), "forward", tmp_path / "rate")
    before = [path.read_bytes() for path in first]
    assert [path.name for path in first] == ["rate.png", "rate.svg"]
    assert before[0].startswith(b"\x89PNG") and b"<svg" in before[1]
    assert [path.read_bytes() for path in plots.save_bars(sample(), "forward", tmp_path / "rate")] == before
    with pytest.raises(ValueError, match="expected one of"):
        plots.save_bars(sample(), "speed", tmp_path / "rate")
