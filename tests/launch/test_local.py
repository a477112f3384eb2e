"""A child process is waited for, and asked to stop exactly once."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from launch.local import run

# asks its parent to stop like an impatient user, counts what arrives, and takes a moment to save, in which a second
# request would arrive
_CHILD = """
import os, signal, sys, time
received = []
signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
deadline = time.monotonic() + 30
for _ in range(3):
    os.kill(os.getppid(), {signal})
    while not received and time.monotonic() < deadline:
        time.sleep(0.01)
time.sleep(0.3)
sys.exit({code} if received == [signal.SIGTERM] else 99)
"""


def _run(code: str) -> int:
    return run([sys.executable, "-c", code], {"OMP_NUM_THREADS": "3"})


@pytest.mark.parametrize("code", [0, 1, 2])
def test_passes_the_exit_code_on(code: int) -> None:
    assert _run(f"import os, sys; sys.exit({code} if os.environ['OMP_NUM_THREADS'] == '3' else 99)") == code


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_forwards_a_stop_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    assert _run(_CHILD.format(signal=int(number), code=143)) == 128 + number
    assert signal.getsignal(number) is before


def test_a_run_that_finishes_all_the_same_has_finished() -> None:
    assert _run(_CHILD.format(signal=int(signal.SIGTERM), code=0)) == 0


def test_a_killed_agent_is_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    assert _run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == 1
    assert "killed by SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize(("ends", "restarts", "code"), [(1, 1, 0), (2, 1, 1), (2, 2, 0)])
def test_a_killed_agent_is_started_again(
    ends: int, restarts: int, code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # counts its starts in a file
    child = f"""
import os, pathlib, signal
starts = pathlib.Path({str(tmp_path / "starts")!r})
starts.write_text((starts.read_text() if starts.exists() else "") + "x")
if len(starts.read_text()) <= {ends}:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run([sys.executable, "-c", child], {}, restarts) == code
    assert capfd.readouterr().err.count("starting it again") == restarts
    assert len((tmp_path / "starts").read_text()) == restarts + 1


def test_an_agent_that_lost_the_first_machine_is_started_again(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([sys.executable, "-c", "import sys; sys.exit(3)"], {}, restarts=1) == 1
    printed = capfd.readouterr().err
    assert "lost the first machine's agent; starting it again (0 restarts left)" in printed
    assert "error: the agent of the ranks lost the first machine's agent" in printed
    # nobody is missed by a run that is over
    assert run([sys.executable, "-c", "import sys; sys.exit(3)"], {}, 1, lambda: True) == 0
    assert capfd.readouterr().err == ""
    # a rank's failure is the agent's business
    assert run([sys.executable, "-c", "import sys; sys.exit(1)"], {}, restarts=1) == 1
    assert "starting" not in capfd.readouterr().err
