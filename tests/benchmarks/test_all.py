"""All benchmarks: a process each, failures do not stop the rest, a repeated command continues, nothing is orphaned."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import all as all_benchmarks
from benchmarks.__main__ import BENCHMARKS, main
from hstu_dist.report.results import Ratio, Results, write


def measured(name: str, *met: bool) -> Results:
    ratios = tuple(Ratio(case="c", metric="m", a="a", b="b", value=float(ok), target=1.0) for ok in met)
    fields = {"command": "c", "date": "d", "commit": "c", "device": "d", "threads": 1, "versions": {}}
    return Results(name=name, rows=(), ratios=ratios, **fields)  # type: ignore[arg-type]


class FakeRuns:
    """Stands for the processes: writes a file, fails or takes too long, as told."""

    def __init__(self, folder: Path, statuses: dict[str, int | None]) -> None:
        self.folder, self.statuses = folder, statuses
        self.ran: list[str] = []
        self.limits: list[float | None] = []

    def __call__(self, command: Sequence[str], seconds: float | None) -> int | None:
        name = command[3]
        self.ran.append(name)
        self.limits.append(seconds)
        if self.statuses.get(name, 0) == 0:
            write(measured(name, True, False), self.folder)
        return self.statuses.get(name, 0)


def test_a_failure_does_not_stop_the_rest_and_a_repetition_runs_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = FakeRuns(tmp_path, {"kernels": 1, "plan": None})
    monkeypatch.setattr(all_benchmarks, "run_group", runs)
    arguments = ["all", "--only", "kernels", "data", "plan", "--device", "cpu", "--output", str(tmp_path)]
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    assert runs.ran == ["kernels", "data", "plan"]
    assert "| kernels | failed with exit code 1 |  |  |  |" in shown
    assert "| plan | out of time |" in shown and "| 1 of 2 | data |" in shown
    runs.statuses = {}
    assert main(arguments) == 0
    assert runs.ran == ["kernels", "data", "plan", "kernels", "plan"]
    assert "| data | already measured |" in capsys.readouterr().out
    # whole: the next run measures anew
    assert main(arguments) == 0
    assert runs.ran[5:] == ["kernels", "data", "plan"]


def test_other_flags_are_another_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = FakeRuns(tmp_path, {"plan": 1})
    monkeypatch.setattr(all_benchmarks, "run_group", runs)
    arguments = ["all", "--only", "data", "plan", "--device", "cpu", "--output", str(tmp_path)]
    assert main(arguments) == main([*arguments, "--quick"]) == 1
    assert runs.ran == ["data", "plan"] * 2


def test_some_of_them_leave_alone_what_an_interrupted_run_of_all_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = FakeRuns(tmp_path, {"plan": 1})
    monkeypatch.setattr(all_benchmarks, "run_group", runs)
    monkeypatch.setattr(all_benchmarks, "BENCHMARKS", {"data": "", "plan": ""})
    everything = ["all", "--device", "cpu", "--output", str(tmp_path)]
    assert main(everything) == 1
    assert main([*everything, "--only", "data"]) == 0
    runs.statuses = {}
    assert main(everything) == 0
    assert runs.ran == ["data", "plan", "data", "plan"]


def test_what_has_no_time_left_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = FakeRuns(tmp_path, {})
    monkeypatch.setattr(all_benchmarks, "run_group", runs)
    clock = iter([0.0, 0.0, 1.0, 2.0, 61.0])
    monkeypatch.setattr(all_benchmarks.time, "monotonic", lambda: next(clock))
    only = ["--only", "data", "plan", "--within", "1"]
    assert main(["all", *only, "--device", "cpu", "--output", str(tmp_path)]) == 1
    assert runs.ran == ["data"] and runs.limits == [60.0]
    assert "| plan | no time left |" in capsys.readouterr().out


def test_the_default_leaves_out_what_takes_hours_or_needs_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = FakeRuns(tmp_path, {})
    monkeypatch.setattr(all_benchmarks, "run_group", runs)
    assert main(["all", "--skip", "kernels", "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert runs.ran == [name for name in BENCHMARKS if name not in (*all_benchmarks.LEFT_OUT, "kernels")]


def test_nothing_to_run_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["all", "--only", "plan", "--skip", "plan", "--device", "cpu"]) == 2
    assert "got nothing to run" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_of_a_group_end_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    parent = (
        "import subprocess, sys, time, pathlib; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        f"pathlib.Path({str(pid)!r}).write_text(str(p.pid)); time.sleep(600)"
    )
    assert all_benchmarks.run_group([sys.executable, "-c", parent], 2.0) is None
    deadline = time.monotonic() + 10
    while _is_running(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(int(pid.read_text()))
    assert all_benchmarks.run_group([sys.executable, "-c", "raise SystemExit(3)"], None) == 3


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    # a zombie is waited for by whoever inherited it
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_sigterm_ends_the_running_benchmark(tmp_path: Path) -> None:
    code = (
        "import sys; from benchmarks import all as a; from benchmarks.__main__ import main\n"
        "def slow(command, seconds):\n"
        "    sleep = 'import time; print(\\'started\\', flush=True); time.sleep(600)'\n"
        "    return original([sys.executable, '-c', sleep], seconds)\n"
        "original, a.run_group = a.run_group, slow\n"
        f"sys.exit(main(['all', '--only', 'plan', '--device', 'cpu', '--output', {str(tmp_path)!r}]))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stdout.readline() == "started\n"
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130 and "the same command goes on" in said
