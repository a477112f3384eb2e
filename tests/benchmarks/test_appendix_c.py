"""Table 2: the three contenders are alike but for what they compare, cells are skipped, and ratios follow the paper."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import appendix_c
from benchmarks.__main__ import main
from benchmarks.appendix_c import CONTENDERS, Cell, Study, write_cell, write_summary
from benchmarks.appendix_c_oracle import best_hit_rates
from benchmarks.study_cells import Run
from hstu_dist.commands.scale_cells import training_compute
from hstu_dist.config import compose
from hstu_dist.data.config import AppendixCConfig
from hstu_dist.models.flops import count_parameters
from hstu_dist.report.results import load


def study(folder: Path) -> Study:
    return Study(settings=("nproc=1", "data.num_records=500000"), runs=folder, output=folder, command="test")


def test_contenders_have_the_same_size_and_compute() -> None:
    configs = {name: compose([f"experiment={experiment}"]) for name, experiment in CONTENDERS.items()}
    for config in configs.values():
        model, _ = config.retrieval
        assert (model.width, model.num_layers, model.num_heads, model.dropout) == (64, 2, 2, 0.0)
        assert config.trainer.epochs == 1 and config.task.records.in_order  # type: ignore[union-attr]
        assert count_parameters(model, 0).relative_bias == 0  # type: ignore[arg-type]
        assert set(config.published) == {"hr@10", "hr@50"}
    computes = {name: training_compute(config) or 0 for name, config in configs.items()}
    assert computes["hstu"] == computes["hstu, softmax"]
    assert computes["transformer"] == pytest.approx(computes["hstu"], rel=0.15)
    hstu, softmax = configs["hstu"].model, configs["hstu, softmax"].model
    assert replace(hstu, activation="softmax") == softmax  # type: ignore[call-arg]


@pytest.mark.slow
def test_means_and_the_order_of_the_paper(tmp_path: Path) -> None:
    here = study(tmp_path)
    figures = {"transformer": 0.04, "hstu, softmax": 0.06, "hstu": 0.05}
    cells = [Cell(contender, seed) for seed in (1, 2) for contender in CONTENDERS]
    assert len({cell.stem for cell in cells}) == len(cells)
    for cell in cells:
        hit = figures[cell.contender] + 0.002 * cell.seed
        result: dict[str, Any] = {
            "test": {"hr@10": hit, "hr@50": 3 * hit, "loss": 7.0},
            "popularity": {"hr@10": 0.001, "hr@50": 0.004, "loss": 9.0},
            "speed": {"training_flops": 2e13, "train_seconds": 100.0},
            "dense_parameters": 1000,
        }
        write_cell(cell, Run(compose(here.overrides(cell)), result, {"commit": "abc"}, []), here)
    summary = write_summary(here)
    assert load("appendix_c", tmp_path) == summary
    case = "500,000 records of 128"
    assert summary.value(case, "hstu", "hr@10") == pytest.approx(0.053)
    assert summary.value("published", "transformer", "hr@50") == 0.2025
    met = {(r.a, r.b): r.met for r in summary.ratios if r.metric == "hr@10, mean of 2 seeds"}
    assert met == {
        ("hstu", "hstu, softmax"): False,
        ("hstu, softmax", "transformer"): True,
        ("hstu", "transformer"): True,
    }


def test_nobody_can_do_better_than_the_oracle() -> None:
    """Items of a category are alike: of the 12 of a record's only one, three are hit in 3 of 12 cases."""
    single = AppendixCConfig(
        num_records=64,
        record_length=9,
        num_items=48,
        num_categories=4,
        item_law="even",
        max_categories=1,
        open_share=1.0,
    )
    assert best_hit_rates(single, range(32, 64), (3, 12, 20)) == pytest.approx({3: 3 / 12, 12: 1.0, 20: 1.0})
    # two categories of 24 items with equal weight, all draws from the prior
    double = replace(single, num_categories=2, max_categories=2, count_law="max", prior="even", max_concentration=1e12)
    assert best_hit_rates(double, range(10), (3, 48)) == pytest.approx({3: 3 / 48, 48: 1.0}, rel=1e-6)


@pytest.mark.long
def test_a_quick_study_runs_and_then_skips_everything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = ["appendix_c", "--quick", "--seeds", "1", "--threads", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert main(command) == 0
    assert load("appendix_c", tmp_path).value("400 records of 16", "prepare", "records") > 0
    before = (tmp_path / "appendix_c.json").read_bytes()
    caplog.clear()
    with caplog.at_level("INFO"):
        assert main(command) == 0
    assert sum("already measured" in message for message in caplog.messages) == len(appendix_c.CONTENDERS)
    assert (tmp_path / "appendix_c.json").read_bytes() == before
