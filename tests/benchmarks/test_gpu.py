"""One command for a machine with a GPU: in order, within its time, and a plain word where there is none."""

from __future__ import annotations

import subprocess
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.environment import ROOT


def test_without_a_gpu_it_says_so_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "run_group", lambda *_: pytest.fail("something was run"))
    assert main(["gpu", "--device", "cpu"]) == 2
    shown = capsys.readouterr().err
    assert "torch finds no GPU on this machine" in shown and shown.count("\n") == 1


def test_make_gpu_is_that_command() -> None:
    printed = subprocess.run(
        ["make", "--dry-run", "--old-file=.venv/.installed", "gpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    # make itself speaks, too, if another make runs the tests
    assert ".venv/bin/python -m benchmarks gpu" in printed.stdout.splitlines()


class Parts:
    """Stands for the processes of the parts."""

    def __init__(self, **statuses: int | None) -> None:
        self.statuses, self.commands = statuses, list[Sequence[str]]()
        self.seconds: list[float | None] = []

    def __call__(self, command: Sequence[str], seconds: float | None) -> int | None:
        self.commands.append(command)
        self.seconds.append(seconds)
        return self.statuses.get(next(name for name in ("pytest", "hstu_dist", command[3]) if name in command), 0)


def on_gpu(monkeypatch: pytest.MonkeyPatch, parts: Parts) -> int:
    monkeypatch.setattr(gpu, "run_group", parts)
    return gpu.run(Namespace(device=torch.device("cuda"), quick=False, output=Path("out")))


def test_tests_come_first_then_tile_sizes_then_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts()
    assert on_gpu(monkeypatch, parts) == 0
    tests, tune, data, measure = parts.commands
    assert tests[1:] == ["-m", "pytest", "-q", "-m", "gpu"] and "--tune" in tune
    assert data[1:] == ["-m", "hstu_dist", "prepare", "data=ml1m"]
    chosen = measure[measure.index("--only") + 1 :]
    assert chosen[:2] == ["attention", "encoder"] and set(chosen) <= set(BENCHMARKS)
    assert measure[measure.index("--within") + 1] == "19"
    assert parts.seconds[:2] == [240.0, 300.0]


def test_there_is_no_figure_without_green_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(pytest=1)
    assert on_gpu(monkeypatch, parts) == 1
    assert len(parts.commands) == 1


@pytest.mark.parametrize("ending", [None, 2])
def test_figures_that_need_no_data_are_made_without_it(monkeypatch: pytest.MonkeyPatch, ending: int | None) -> None:
    parts = Parts(hstu_dist=ending)
    # the training step's failure is that of the benchmarks
    assert on_gpu(monkeypatch, parts) == 0
    assert "all" in parts.commands[3]


def test_tile_sizes_may_run_out_of_time_but_tests_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(attention=None)
    assert on_gpu(monkeypatch, parts) == 0 and len(parts.commands) == 4
    with pytest.raises(gpu.UserError, match="tests took more than 4 minutes"):
        on_gpu(monkeypatch, Parts(pytest=None))
