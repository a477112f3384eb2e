"""The agent names the rank that failed first, once, whatever the others did because of it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)

from hstu_dist.console import leave_word
from hstu_dist.distributed.agent import describe, explain, explain_meeting, root_cause
from hstu_dist.errors import ExitCode
from tests.launch.runs import Started, TinyRun

_LOST, _KILLED, _TERMINATED = int(ExitCode.PEER_LOST), -signal.SIGKILL, -signal.SIGTERM


def _failures(*ends: tuple[int, int]) -> dict[int, ProcessFailure]:
    """Rank → (exit code, second)."""
    failures = {}
    for rank, (code, second) in enumerate(ends):
        failures[rank] = ProcessFailure(local_rank=rank, pid=1000 + rank, exitcode=code, error_file="")
        failures[rank].timestamp = second
    return failures


@pytest.mark.parametrize(
    ("ends", "first"),
    [
        ([(1, 5), (1, 4)], 1),
        ([(_LOST, 4), (_KILLED, 4)], 1),
        ([(_LOST, 4), (1, 5)], 1),
        ([(1, 4), (_KILLED, 4)], 1),
        ([(_TERMINATED, 4), (2, 4)], 1),
        # ranks that do not end after SIGTERM are killed by the agent, later
        ([(_KILLED, 34), (1, 4)], 1),
        ([(_LOST, 5), (_LOST, 4)], 1),
        ([(_TERMINATED, 5), (_LOST, 4)], 1),
    ],
)
def test_root_cause(ends: list[tuple[int, int]], first: int) -> None:
    assert root_cause(_failures(*ends)) == first


@pytest.mark.parametrize(
    ("code", "exit_code", "said"),
    [
        (_KILLED, 1, "rank 0 was killed by SIGKILL"),
        (-signal.SIGSEGV, 1, "rank 0 was killed by SIGSEGV"),
        (1, 1, "rank 0 ended with exit code 1"),
        (_LOST, 1, "rank 0 lost contact"),
        (2, 2, ""),
    ],
)
def test_explains_in_one_line(code: int, exit_code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    failures = _failures((code, 4))
    assert explain(failures, describe(failures, out_of_memory=False)) == exit_code
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(start) for line, start in zip(lines, ("error: ", "  mend: "), strict=bool(said))] == (
        [True, True] if said else []
    )
    assert said in "".join(lines)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RendezvousClosedError(), 1, "error: another machine has ended the run"),
        (
            RendezvousConnectionError("see cause"),
            3,
            "the first machine's agent is gone or cannot be reached: see cause",
        ),
        (RendezvousTimeoutError(), 1, "error: the agents of the machines did not meet: RendezvousTimeoutError"),
    ],
)
def test_why_agents_cannot_work_together(
    error: RendezvousError, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain_meeting(error) == code
    assert capsys.readouterr().err.splitlines()[0] == said


def test_says_why_the_kernel_killed() -> None:
    killed = _failures((_LOST, 4), (_KILLED, 4))
    assert describe(killed, out_of_memory=True).startswith("rank 1 was killed by SIGKILL: the kernel ended it because")
    assert describe(killed, out_of_memory=False) == (
        "rank 1 was killed by SIGKILL, by hand or because a limit of memory was reached"
    )
    # it was not the kernel that ended this one
    assert "memory" not in describe(_failures((-signal.SIGSEGV, 4)), out_of_memory=True)


def test_passes_on_what_a_rank_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error_file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    leave_word("waited in vain for another rank; silent (stopped, dead or cut off): rank 3 after step 17")
    failure = ProcessFailure(local_rank=0, pid=1000, exitcode=_LOST, error_file=str(error_file))
    assert describe({5: failure}, out_of_memory=False) == (
        "rank 5 waited in vain for another rank; silent (stopped, dead or cut off): rank 3 after step 17"
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_what_all_ranks_refuse_is_said_once(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "nowhere", tmp_path)
    agent = ["-m", "hstu_dist.distributed.agent", "--nproc-per-node=2", "-m", "hstu_dist", "train"]
    with Started([*agent, *run.overrides], tmp_path / "printed", {"OMP_NUM_THREADS": "1"}) as process:
        ended = process.wait()
    assert ended.code == ExitCode.BAD_INPUT
    assert ended.err.count("error: ") == 1 and ended.err.count("mend: ") == 1, ended.err
    assert "Traceback" not in ended.err and "elastic" not in ended.err


@pytest.mark.slow
@pytest.mark.distributed
def test_what_one_rank_finds_is_said_once(tiny_data: Path, tmp_path: Path) -> None:
    run = TinyRun(tiny_data, tmp_path)
    agent = ["-m", "hstu_dist.distributed.agent", "--nproc-per-node=2", "-m", "tests.launch.nan_on_rank_1", "train"]
    with Started([*agent, *run.overrides], tmp_path / "printed", {"OMP_NUM_THREADS": "1"}) as process:
        ended = process.wait()
    assert ended.code == ExitCode.BAD_INPUT
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    # one rank found it, all refused
    assert {p.name for p in (run.folder / "replay" / "step-00000003").iterdir()} == {"rank-0.pt", "rank-1.pt"}
    assert run.checkpoints() == [5, 6]
    assert errors == ["error: step 5: the loss is not a finite number on rank 1, 3 steps in a row"], ended.err
    assert "Traceback" not in ended.err


@pytest.mark.slow
@pytest.mark.distributed
def test_restarted_ranks_find_each_other(tmp_path: Path) -> None:
    agent = ["-m", "hstu_dist.distributed.agent", "--nproc-per-node=2", "--max-restarts=1"]
    with Started([*agent, "-m", "tests.launch.dies_once"], tmp_path, {"OMP_NUM_THREADS": "1"}) as process:
        ended = process.wait()
    assert ended.code == 0, ended.err
    assert sorted(ended.out.splitlines()) == ["rank 0: 4", "rank 1: 4"]
    assert "a rank failed; starting all ranks again (1 of 1 restarts left)" in ended.err
