"""Two nodes of a real Slurm: a run ends, survives a requeue and its time limit, and stops when it is cancelled."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.runs import Ended, Started, TinyRun
from tests.launch.virtual_slurm import ENDED, VirtualSlurm, missing, virtual_slurm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualSlurm]:
    with virtual_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def submit(run: TinyRun, slurm: VirtualSlurm, *more: str) -> str:
    """Launches a run of two nodes with a rank each; its job number."""
    settings = ["cluster=slurm", "cluster.nodes=2", "nproc=1", "cluster.cpus_per_rank=1", "trainer.threads=1"]
    settings += more
    with Started(["-m", "launch", *run.overrides, *settings], run.output / "printed", slurm.environment) as process:
        ended = process.wait()
    assert ended.code == 0, ended.err
    number = re.search(r"submitted job (\d+)", ended.out)
    assert number is not None
    return number[1]


def ask(question: str, run: TinyRun, slurm: VirtualSlurm) -> Ended:
    with Started(["-m", "launch", question, str(run.folder)], run.output / question, slurm.environment) as process:
        return process.wait()


def output_of(run: TinyRun, job: str) -> str:
    return (run.folder / "logs" / f"slurm-{job}.out").read_text()


def wait_for_step(step: int, run: TinyRun, job: str, slurm: VirtualSlurm) -> None:
    def there() -> bool:
        assert slurm.field(job, "JobState") not in ENDED, output_of(run, job)
        return run.step() >= step

    slurm.wait_until(there, f"no step {step}")


def test_two_nodes_requeued_in_the_middle(
    undisturbed: tuple[TinyRun, Ended], slurm: VirtualSlurm, tmp_path: Path
) -> None:
    whole, _ = undisturbed
    run = TinyRun(whole.data, tmp_path / "my runs")
    job = submit(run, slurm)
    wait_for_step(2, run, job, slurm)
    slurm.call("scontrol", "requeue", job)
    assert slurm.wait_for_end(job) == "COMPLETED", output_of(run, job)
    assert slurm.field(job, "Restarts") == "1"
    assert "continuing at epoch" in output_of(run, job)
    assert run.result() == whole.result()
    # each rank has a file of its own, under its node
    assert {p.parts[-5] for p in run.folder.glob("logs/node*/*/attempt_0/0/stdout.log")} == {"node0", "node1"}
    assert "no longer in the queue" in ask("status", run, slurm).out
    assert "popularity" in ask("logs", run, slurm).out


def test_near_its_time_limit_a_job_saves_and_queues_again(
    undisturbed: tuple[TinyRun, Ended], slurm: VirtualSlurm, tmp_path: Path
) -> None:
    whole, _ = undisturbed
    run = TinyRun(whole.data, tmp_path)
    job = submit(run, slurm, "trainer.epochs=2000")
    wait_for_step(6, run, job, slurm)
    assert f"job {job}: RUNNING" in ask("status", run, slurm).out
    # what Slurm itself sends to the batch script near the limit, whose clock would make a slow test
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_until(lambda: slurm.field(job, "Restarts") == "1", "not requeued")
    stopped = re.search(r"stopped at step (\d+) by .*/stop", output_of(run, job))
    assert stopped is not None and int(stopped[1]) >= 6
    assert not (run.folder / "stop").exists()
    wait_for_step(int(stopped[1]) + 1, run, job, slurm)
    assert f"step {stopped[1]}\n" in output_of(run, job).split("continuing at")[1]

    cancelled = ask("cancel", run, slurm)
    assert cancelled.code == 0 and "asked to save" in cancelled.out
    assert slurm.wait_for_end(job) == "COMPLETED"
    assert slurm.field(job, "Restarts") == "1" and output_of(run, job).count("stopped at step") == 2
