"""The attention benchmark: FLOP law, layouts, contenders that are right, refusal of those that are not."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import attention, attention_cases, attention_contenders
from benchmarks.attention_cases import Case, cases
from benchmarks.attention_contenders import BASELINES, Baseline, Jagged, Padded, PerSequence, build, computes_softmax
from benchmarks.attention_problem import expected, make_problem
from hstu_dist.ops import backends
from hstu_dist.ops.spec import Backend
from hstu_dist.report.results import load

CPU = torch.device("cpu")
LENGTHS = (7, 1, 12)


def small_case(**changes: object) -> Case:
    fields = {"key": "small", "name": "small", "lengths": LENGTHS, "heads": 2, "width": 8} | changes
    return Case(**fields)  # type: ignore[arg-type]


def test_needed_work_counts_visible_pairs_once_a_product() -> None:
    case = small_case(lengths=(3, 2), heads=2, width=4)
    visible = sum(int(torch.ones(n, n).tril().sum()) for n in case.lengths)
    assert case.flops(backward=False) == 2 * visible * 2 * 4 * 2
    assert case.flops(backward=True) == 3.5 * case.flops(backward=False)


@pytest.mark.parametrize("form", [Jagged(), Padded(LENGTHS), PerSequence(LENGTHS)], ids=lambda f: type(f).__name__)
def test_layouts_give_back_what_they_were_given(form: attention_contenders.Form) -> None:
    x_THW = torch.randn(sum(LENGTHS), 2, 8)
    parts = form.split(x_THW)
    assert all(part.is_contiguous() for part in parts)
    assert torch.equal(form.join(parts), x_THW)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["blocked", *BASELINES])
def test_contenders_compute_what_they_claim(name: str, bias: bool) -> None:
    problem = make_problem(small_case(bias=bias), CPU, torch.float32)
    softmax = computes_softmax(name)
    spec = problem.softmax_spec() if softmax else problem.hstu_spec(Backend.REFERENCE)
    assert build(name, problem).error(expected(problem, spec, bias=bias and not softmax)) < 5e-6


def test_the_check_sees_a_wrong_scale_and_a_wrong_gradient_of_one_weight() -> None:
    problem = make_problem(small_case(bias=True), CPU, torch.float32)
    exact = expected(problem, problem.hstu_spec(Backend.REFERENCE), bias=True)
    right = build("blocked", problem)
    assert right.error(exact) < 5e-6
    scaled = replace(right, attend=lambda: tuple(1.01 * x for x in right.attend()))
    assert scaled.error(exact) > 5e-3
    for name in exact.values:
        shifted = dict(exact.values) | {name: exact.values[name] + 0.01 * exact.values[name].abs().max()}
        assert right.error(replace(exact, values=shifted)) > 5e-3, name


def test_the_cases_are_those_promised() -> None:
    long, quarter, jagged, ml1m = cases()
    assert long.lengths == (8192, 8192) and quarter.lengths == (8192,)
    assert (len(jagged.lengths), min(jagged.lengths), max(jagged.lengths)) == (16, 100, 1024)
    assert (len(ml1m.lengths), ml1m.width, ml1m.bias, max(ml1m.lengths)) == (128, 50, True, 200)
    for case in cases():
        tiny = case.tiny()
        assert max(tiny.lengths) <= 48 and not tiny.speed_targets and tiny.memory_limit_mb is None


def test_lengths_come_from_the_prepared_data_set_or_from_its_stored_histogram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = attention_cases._ml1m_histogram(tmp_path)
    # 6,040 users, each with at least 20 ratings
    assert (stored.total(), min(stored), max(stored)) == (6040, 20, 200)
    (tmp_path / attention_cases.MANIFEST_FILE).touch()
    monkeypatch.setattr(attention_cases.SequenceDataset, "open", lambda _: Namespace(lengths=[5, 300, 200]))
    assert attention_cases._ml1m_histogram(tmp_path) == {5: 1, 200: 2}


@pytest.fixture
def quick_settings(monkeypatch: pytest.MonkeyPatch) -> attention.Settings:
    # memory needs a process for each contender; test_memory covers it
    monkeypatch.setattr(attention, "peak_extra_mb", lambda *_: 100.0)
    return attention.settings_for(CPU, quick=True)


@pytest.mark.slow
def test_a_case_gives_rows_and_ratios(quick_settings: attention.Settings) -> None:
    case = small_case(
        baselines=("sdpa_padded", "sdpa_per_sequence", "padded_eager"),
        speed_targets={"sdpa": 1.5, "padded_eager": 1e9},
        memory_limit_mb=50.0,
    )
    findings = attention.Findings()
    attention.measure(case, quick_settings, findings)
    ours = str(backends.fastest(CPU))
    assert not findings.refused
    figures = {(row.contender, row.metric): row for row in findings.rows}
    assert figures[ours, "forward+backward"].n >= 3
    assert figures[ours, "forward rate"].unit == "GFLOP/s"
    assert (ours, "peak extra memory") in figures and ("gemm", "forward rate") in figures

    ratios = {(ratio.metric, ratio.a, ratio.b): ratio for ratio in findings.ratios}
    sdpa = [b for _, _, b in ratios if b.startswith("sdpa")]
    # one variant a pass: the better one
    assert len(sdpa) == 2
    assert not ratios["forward rate", ours, "padded_eager"].met
    assert ratios["forward rate", ours, f"{ours} again"].target is None
    assert ratios["peak extra memory", "limit 50 MB", ours].value == 0.5
    eager, mine = (figures[name, "forward"] for name in ("padded_eager", ours))
    bounds = eager.q25 / mine.q75 / 3, eager.q75 / mine.q25 * 3
    assert bounds[0] < ratios["forward rate", ours, "padded_eager"].value < bounds[1]


def test_memory_that_grows_with_the_square_misses_its_target(
    quick_settings: attention.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for power, met in ((1, True), (2, False)):
        monkeypatch.setattr(
            attention, "peak_extra_mb", lambda step, *_, power=power: float(step.args[1].longest ** power)
        )
        findings = attention.Findings()
        attention._measure_growth(quick_settings, findings)
        assert [ratio.met for ratio in findings.ratios] == [met]
        assert len(findings.rows) == len(quick_settings.growth)


@pytest.mark.slow
def test_a_wrong_contender_gets_no_row_and_fails_the_run(
    quick_settings: attention.Settings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_large(problem: attention_contenders.Problem) -> attention_contenders.Implementation:
        right = attention_contenders.padded_eager(problem)
        return replace(right, attend=lambda: tuple(1.01 * x for x in right.attend()))

    broken: Mapping[str, Baseline] = dict(BASELINES) | {"padded_eager": Baseline(too_large, softmax=False)}
    monkeypatch.setattr(attention_contenders, "BASELINES", broken)
    options = Namespace(device=CPU, quick=True, only="quarter", tune=False, rounds=5, output=tmp_path, command="test")
    assert attention.run(options) == 1
    assert "refused, no row" in capsys.readouterr().out
    assert not any(row.contender == "padded_eager" for row in load("attention_cpu", tmp_path).rows)


@pytest.mark.slow
def test_quick_run_writes_a_whole_result(tmp_path: Path) -> None:
    from benchmarks.__main__ import main

    assert main(["attention", "--quick", "--only", "ml1m", "--device", "cpu", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "attention_cpu.json").read_text())
    assert found["command"].startswith("python -m benchmarks attention --quick")
    assert {row["metric"] for row in found["rows"]} >= {"forward", "forward+backward", "peak extra memory"}
    assert (tmp_path / "attention_cpu_rate.svg").exists()
