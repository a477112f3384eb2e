"""The command line names its benchmarks, and its mistakes are one line long."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import attention
from benchmarks.environment import RESULTS, ROOT, describe


def test_help_lists_every_benchmark_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown and summary in shown for name, summary in command_line.BENCHMARKS.items())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(["speed"], "expected one of attention"), (["attention", "--device", "cpu", "--tune"], "expected a GPU")],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(arguments) == 2
    shown = capsys.readouterr().err
    assert problem in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], RESULTS),
        (["--quick"], ROOT / "runs" / "benchmarks"),
        (["--only", "jagged"], ROOT / "runs" / "benchmarks"),
        (["--quick", "--output", "here"], Path("here")),
    ],
)
def test_only_a_whole_run_touches_the_committed_results(arguments: list[str], folder: Path) -> None:
    assert command_line._options("attention", arguments, attention).output == folder


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--device", "tpu"]])
def test_options_are_checked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line._options("attention", arguments, attention)
    assert "expected" in capsys.readouterr().err


def test_a_measurement_knows_where_it_ran() -> None:
    here = describe(torch.device("cpu"))
    assert here.threads == torch.get_num_threads()
    assert here.versions["torch"] == torch.__version__
    assert here.device and here.date.endswith("+00:00")
    assert here.commit == "unknown" or len(here.commit.removesuffix("+changes")) == 40
