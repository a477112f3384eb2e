"""Two real ranks: a launch ends like plain torchrun, and like itself after any interruption."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from hstu_dist.errors import ExitCode
from tests.launch.runs import Ended, Started, TinyRun

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_launch_trains_and_prints_the_table(undisturbed: tuple[TinyRun, Ended]) -> None:
    run, ended = undisturbed
    assert ended.code == 0, ended.err
    result = run.result()
    assert (result["epochs"], result["steps"], result["world_size"]) == (6, 48, 2)
    for metric, value in result["test"].items():
        assert metric in ended.out and f"{value:.4f}" in ended.out
    # better than popularity: it has learnt something
    assert result["test"]["ndcg@10"] > 1.2 * result["popularity"]["ndcg@10"]
    assert "OMP_NUM_THREADS" not in ended.err and "Traceback" not in ended.err


def test_the_same_command_again_starts_nothing(undisturbed: tuple[TinyRun, Ended]) -> None:
    run, first = undisturbed
    written = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    with run.launch() as launch:
        again = launch.wait()
    assert again.code == 0 and "already finished at epoch 6, step 48" in again.out
    # the same table, line for line
    assert first.out.splitlines()[-5:] == again.out.splitlines()[-5:]
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == written


def test_plain_torchrun_gives_the_same_run(undisturbed: tuple[TinyRun, Ended], tmp_path: Path) -> None:
    run, _ = undisturbed
    plain = TinyRun(run.data, tmp_path)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "hstu_dist", "train"]
    with Started([*torchrun, *plain.overrides], tmp_path / "printed", {"OMP_NUM_THREADS": "1"}) as process:
        ended = process.wait()
    assert ended.code == 0, ended.err
    assert plain.result() == run.result()


def test_interruptions_change_nothing(undisturbed: tuple[TinyRun, Ended], tmp_path: Path) -> None:
    whole, _ = undisturbed
    run = TinyRun(whole.data, tmp_path)

    with run.launch() as launch:
        run.wait_for_step(6, launch)
        launch.process.send_signal(signal.SIGTERM)
        stopped = launch.wait()
    last = run.checkpoints()[-1]
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    assert f"stopped at step {last}" in stopped.out and last >= 6

    with run.launch() as launch:
        run.wait_for_step(last + 7, launch)
        launch.ranks()[1].kill()
        killed = launch.wait()
    assert killed.code == ExitCode.FAILED
    assert f"step {last}" in killed.out
    assert killed.err.count("error: ") == 1 and "error: rank 1 was killed by SIGKILL" in killed.err, killed.err
    assert "Traceback" not in killed.err and not (run.folder / "result.json").exists()

    last = run.checkpoints()[-1]
    with run.launch() as launch:
        finished = launch.wait()
    assert finished.code == 0, finished.err
    assert f"step {last}\n" in finished.out
    assert run.result() == whole.result()
