"""The ranks that other tests run on: results in order, a failure shown, nobody left hanging."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from hstu_dist.distributed.process_group import claim_machine, process_group, sum_over_ranks
from hstu_dist.errors import UserError
from tests.distributed.ranks import RanksFailedError, run_ranks


def world_facts() -> tuple[int, int, int, int, bool]:
    with process_group("cpu", 30) as world:
        total = int(sum_over_ranks(torch.tensor(world.rank + 1)))
        return world.rank, world.size, world.local_size, total, world.is_main


def fail_on(rank: int) -> None:
    with process_group("cpu", 30) as world:
        if world.rank == rank:
            raise ValueError("this rank is broken")
        sum_over_ranks(torch.zeros(1))


def die() -> None:
    os._exit(9)


@pytest.mark.distributed
def test_ranks_meet_again_and_again() -> None:
    for size in (2, 1, 3, 2):
        total = size * (size + 1) // 2
        assert run_ranks(size, world_facts) == [(rank, size, size, total, rank == 0) for rank in range(size)]


@pytest.mark.distributed
def test_a_failure_is_shown_and_hangs_nobody() -> None:
    with pytest.raises(RanksFailedError, match=r"(?s)rank 1 of 2: .*ValueError: this rank is broken"):
        run_ranks(2, fail_on, 1)
    with pytest.raises(RanksFailedError, match="rank 0 of 1: died without a word"):
        run_ranks(1, die)


def test_a_single_process_needs_no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    threads = torch.get_num_threads()
    with process_group("auto" if not torch.cuda.is_available() else "cpu", 5) as world:
        assert (world.rank, world.size, world.local_size, world.device.type) == (0, 1, 1, "cpu")
        assert claim_machine(3, world) == torch.get_num_threads() == 3
        assert claim_machine(None, world) >= 1
    assert not dist.is_initialized()
    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"trainer\.device: got cuda"), process_group("cuda", 5):
            pass
