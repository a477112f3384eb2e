"""The train_step benchmark: what counts as which part, targets as ratios, and a whole run on a tiny data set."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.train_step import CASES, Case, overrides_of, ratios_of, rows_of
from benchmarks.train_step_worker import PARTS, Answer, part_of
from hstu_dist.report import results
from tests.tiny import tiny_overrides, write_tiny_dataset

ANSWER = Answer(
    seconds=[0.5, 0.2, 0.4],
    tokens=[100, 50, 80],
    flops=[10**9, 10**9, 10**9],
    gemm_flops_per_second=[10e9, 10e9, 20e9],
    peak_bytes=500_000_000,
    parts=dict.fromkeys(PARTS, 0.1),
)


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["aten::mm", "_ProjectSilu", "encode"], "projections"),
        (["aten::mm", "_SoftmaxLoss", "loss"], "loss"),
        (["aten::mul", "_SoftmaxLossBackward"], "loss"),
        (["_GatedOutputBackward"], "norms, SiLU, gate, dropout"),
        (["hstu_dist::attention_backward", "GeneratedBackwardFor_hstu_dist_attention_defaultBackward"],
         "attention backward"),
        (["aten::empty", "GeneratedBackwardFor_hstu_dist_attention_default", "encode"], "attention forward"),
        (["aten::sqrt", "Optimizer.step#AdamW.step", "update"], "dense optimizer"),
        (["aten::index", "look up"], "table look-up and update"),
        (["aten::copy_"], "other"),
    ],
)  # fmt: skip
def test_time_belongs_to_the_innermost_known_part_and_the_loss_claims_all_inside_it(
    names: list[str], part: str
) -> None:
    assert part_of(names) == part and part in PARTS


def test_rates_are_medians_over_steps_and_targets_are_better_when_larger() -> None:
    case = Case(name="HSTU-large", overrides=(), seconds=0.2)
    rows = {(row.contender, row.metric): row.value for row in rows_of("x", ANSWER)}
    assert rows["hstu_dist", "step"] == 0.4 and rows["hstu_dist", "tokens"] == 200
    assert rows["hstu_dist", "needed FLOPs"] == 2.5 and rows["gemm", "needed FLOPs"] == 10
    assert rows["hstu_dist", "profiled: loss"] == 0.1
    ratios = {ratio.metric: ratio for ratio in ratios_of("x", case, ANSWER)}
    assert ratios["needed FLOPs"].value == 0.25 and ratios["needed FLOPs"].target is None
    assert ratios["step"].value == 0.5 and ratios["step"].met is False
    assert ratios["peak memory"].value == 2.0 and ratios["peak memory"].met is True


def test_device_and_threads_of_the_command_line_reach_the_run() -> None:
    options = argparse.Namespace(device=torch.device("cpu"), threads=3, override=["seed=5"])
    given = overrides_of(CASES[0], 2, options)
    assert given == [*CASES[0].overrides, "nproc=2", "trainer.device=cpu", "trainer.threads=3", "seed=5"]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_tiny_run_reports_every_part(tmp_path: Path) -> None:
    data = write_tiny_dataset(tmp_path / "data")
    # nproc is the benchmark's to set
    overrides = [o for o in tiny_overrides(data, tmp_path) if not o.startswith(("nproc=", "name="))]
    options = [word for override in overrides for word in ("--override", override)]
    assert main(["train_step", "--quick", "--only", CASES[0].name, "--output", str(tmp_path), *options]) == 0
    found = results.load("train_step", tmp_path)
    for ranks in CASES[0].ranks:
        parts = {row.metric: row.value for row in found.rows if f", {ranks} x" in row.case}
        assert parts["step"] > 0 and parts["tokens"] > 0
        assert all(parts[f"profiled: {part}"] > 0 for part in PARTS if part != "other")
