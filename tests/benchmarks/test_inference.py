"""The inference benchmark: what counts as needed work, what a run goes on with, and a server under load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import inference
from benchmarks.__main__ import main
from benchmarks.cells import Findings
from benchmarks.harness import Samples, Timings
from benchmarks.inference import ALONE, CACHED, COLD, Problem, flops, speed_ratios
from hstu_dist.report import results


def test_needed_work_of_a_request() -> None:
    problem = Problem(history=4096, candidates=1024)
    needed = flops(problem)
    # 4 layers: projections 10 D^2 a token, 2 x (Q + V) of all heads a pair of tokens
    per_token, per_pair = 4 * 10 * 256 * 256, 4 * 4 * 256
    assert needed[CACHED] == 1024 * per_token + 1024 * 4097 * per_pair
    assert needed[COLD] - needed[CACHED] == 4096 * per_token + 4096 * 4097 // 2 * per_pair
    assert needed[ALONE] == 1024 * (4097 * per_token + 4097 * 4098 // 2 * per_pair)


def test_ratios_are_against_the_targets_and_against_arithmetic() -> None:
    problem = Problem(history=4096, candidates=1024)
    needed = flops(problem)
    seconds = {ALONE: Samples((0.5,)), COLD: Samples((1.0,)), CACHED: Samples((0.25,))}
    found = {ratio.metric: ratio for ratio in speed_ratios(problem, Timings(seconds))}
    assert found["candidates/s"].value == pytest.approx(512) and found["candidates/s"].met
    of_bound = found["candidates/s, measured over the arithmetic bound"]
    assert of_bound.value == pytest.approx(512 / (needed[ALONE] / needed[COLD])) and of_bound.target == 0.9
    assert found["repeated request"].value == pytest.approx(4.0) and not found["repeated request"].met
    bound = needed[COLD] / needed[CACHED]
    assert found["repeated request, measured over the arithmetic bound"].value == pytest.approx(4 / bound)


def test_an_interrupted_run_goes_on_with_the_part_that_is_missing(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("aiohttp")

    def interrupted(*_: object) -> Findings:
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "speed", lambda problem, *_: Findings(refused=[problem.label()]))
    monkeypatch.setattr(inference, "memory", interrupted)
    monkeypatch.setattr(inference, "serving", lambda quick: Findings([Samples((1.0,)).row("serve", "x", "y", "ms")]))
    arguments = ["inference", "--quick", "--device", "cpu", "--output", str(tmp_path)]
    assert main(arguments) == 130 and not (tmp_path / "inference.json").exists()
    monkeypatch.setattr(inference, "speed", interrupted)
    monkeypatch.setattr(inference, "memory", lambda *_: Findings())
    assert main(arguments) == 0
    assert [row.case for row in results.load("inference", tmp_path).rows] == ["serve"]


@pytest.mark.slow
def test_a_server_under_load_answers_or_refuses_clearly() -> None:
    pytest.importorskip("aiohttp")
    found = inference.serving(quick=True)
    assert "as fast as 16 clients go" in {row.contender for row in found.rows}
    overload = next(ratio for ratio in found.ratios if ratio.metric.startswith("200 or a clear 503"))
    assert overload.value == 1.0
