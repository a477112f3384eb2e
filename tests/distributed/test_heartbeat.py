"""Who waits in vain can say for whom: a rank that fell silent, or one that is alive but behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time

import pytest
import torch

from hstu_dist.distributed.heartbeat import Beat, describe
from hstu_dist.distributed.process_group import process_group, sum_over_ranks
from hstu_dist.errors import PeerLostError
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([(1, 5), (1, 5)], [(3, 5), (3, 5)], "all ranks are alive and equally far"),
        ([(1, 5), (7, 4)], [(3, 5), (7, 4)], "silent (stopped, dead or cut off): rank 1 after step 4"),
        ([(1, 5), None], [(3, 5), None], "silent (stopped, dead or cut off): rank 1 before its first step"),
        (
            [(1, 5), (1, 3), (1, 5)],
            [(3, 5), (3, 3), (3, 5)],
            "alive, but behind the others: rank 1 after step 3, others at 5",
        ),
        (
            [(1, 5), *[(1, 2)] * 6],
            [(3, 5), *[(1, 2)] * 6],
            "silent (stopped, dead or cut off): rank 1 after step 2, rank 2 after step 2, rank 3 after step 2, "
            "rank 4 after step 2 and 2 more",
        ),
    ],
)
def test_what_the_beats_tell(
    before: list[tuple[int, int] | None], after: list[tuple[int, int] | None], said: str
) -> None:
    read = [[None if beat is None else Beat(*beat) for beat in beats] for beats in (before, after)]
    assert describe(*read, rank=0) == said


def stopped_rank(stopped: int, port: int) -> str:
    """On a rank: how the others describe one that does not run, as after Ctrl-Z or while its machine swaps."""
    # as a launch has it: the store is in rank 0
    os.environ["MASTER_PORT"] = str(port)
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    pids = torch.zeros(3, dtype=torch.int64)
    try:
        with process_group("cpu", timeout_seconds=2) as world:
            assert world.heartbeat is not None
            world.heartbeat.step = 17 + world.rank
            pids[world.rank] = os.getpid()
            pids = sum_over_ranks(pids)
            # a beat with the step in it
            time.sleep(1.5)
            sum_over_ranks(pids)
            if world.rank == stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
            sum_over_ranks(pids)
    except PeerLostError as error:
        # woken by another rank already, it may have ended
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pids[stopped]), signal.SIGCONT)
        return str(error)
    return "nothing amiss"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stopped", "said"),
    [
        (0, "rank 0 is gone, stopped or cannot be reached"),
        (1, "silent (stopped, dead or cut off): rank 1 after step 18"),
    ],
)
def test_a_stopped_rank_is_named(stopped: int, said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    told = run_ranks(3, stopped_rank, stopped, port)
    assert f"waited in vain for another rank; {said}" in [text for rank, text in enumerate(told) if rank != stopped]
