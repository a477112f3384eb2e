"""What lies between the ranks: bandwidth of the collectives that training uses, clocks, code and run folder."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from hstu_dist.distributed.agreement import check_machines_agree
from hstu_dist.distributed.process_group import World
from hstu_dist.doctor.finding import Finding, Status, fail, ok, warn

_BYTES = 16 << 20
_ROUNDS = 5
_SLOW = 0.1e9
"""Bytes a second of a rank below which communication outlasts the computation of any model worth several machines."""
_SKEW_SECONDS = 2.0
_LARGEST_SKEW_SECONDS = 6.0
"""Agents take a machine for lost whose last sign of life is older by their own clock."""


def rank_checks(world: World, folder: Path, own: Sequence[Finding] = ()) -> dict[str, Callable[[], Finding]]:
    """All of them by name; every rank calls each in the same order.

    Args:
        world: this rank among the others.
        folder: of all runs.
        own: what was found on this machine, of one rank a machine; empty on the others and where it has been shown.
    """
    others = {"other machines": lambda: _others(own)} if world.size > world.local_size else {}
    return {
        "ranks": lambda: _ranks(world),
        **others,
        "machines agree": lambda: _agree(world, folder),
        "all-reduce": lambda: _all_reduce(world),
        "all-to-all": lambda: _all_to_all(world),
        "clocks": lambda: _clocks(world),
    }


def _ranks(world: World) -> Finding:
    hosts: list[str] = [""] * world.size
    dist.all_gather_object(hosts, socket.gethostname())
    backend = dist.get_backend()
    return ok("ranks", f"{world.size} over {backend} on {', '.join(dict.fromkeys(hosts))}")


def _others(own: Sequence[Finding]) -> Finding:
    """What is amiss on machines whose report nobody sees, as bad as the worst of it."""
    everyone: list[list[tuple[str, Finding]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, [(socket.gethostname(), finding) for finding in own])
    found = [pair for one in everyone for pair in one]
    amiss = [(host, finding) for host, finding in found if finding.status is not Status.OK]
    if not amiss:
        hosts = ", ".join(dict.fromkeys(host for host, _ in found))
        return ok("other machines", f"packages, memory and folders of {hosts} are in order")
    failed = any(finding.status is Status.FAIL for _, finding in amiss)
    return (fail if failed else warn)(
        "other machines",
        "; ".join(f"{host}: {finding.name}: {finding.found}" for host, finding in amiss),
        "; ".join(dict.fromkeys(finding.remedy for _, finding in amiss)),
    )


def _agree(world: World, folder: Path) -> Finding:
    check_machines_agree(world, folder)
    if world.size == world.local_size:
        return ok("machines agree", "there is one only")
    return ok("machines agree", "same code and libraries, one run folder")


def _all_reduce(world: World) -> Finding:
    values = torch.ones(_BYTES // 4, device=world.device)
    # each rank sends and receives 2 (N - 1) / N of it in a ring
    share = 2 * (world.size - 1) / world.size
    return _judged("all-reduce", _best(world, lambda: dist.all_reduce(values)), share)


def _all_to_all(world: World) -> Finding:
    # table rows travel like this
    rows = _BYTES // 4 // world.size
    sent = torch.ones(rows * world.size, device=world.device)
    received = torch.empty_like(sent)
    share = (world.size - 1) / world.size
    return _judged("all-to-all", _best(world, lambda: dist.all_to_all_single(received, sent)), share)


def _judged(name: str, seconds: float, share: float) -> Finding:
    rate = share * _BYTES / seconds
    found = f"{_BYTES >> 20} MiB in {seconds * 1e3:.1f} ms, {rate / 1e9:.2f} GB/s a rank"
    if share and rate < _SLOW:
        return warn(name, found, "see that the ranks talk over the fast network: cluster.interface=NAME")
    return ok(name, found)


def _best(world: World, collective: Callable[[], object]) -> float:
    """Seconds of the fastest of a few rounds, by the slowest rank."""
    times = []
    for _ in range(_ROUNDS):
        dist.barrier()
        started = time.perf_counter()
        collective()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        times.append(time.perf_counter() - started)
    slowest = torch.tensor(times, dtype=torch.float64, device=world.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest.min())


def _clocks(world: World) -> Finding:
    """Wall clocks read by all ranks right after a barrier; the quickest of a few is the fairest."""
    spreads = []
    for _ in range(_ROUNDS):
        dist.barrier()
        mine = torch.tensor([time.time()], dtype=torch.float64, device=world.device)
        everyone = [torch.empty_like(mine) for _ in range(world.size)]
        dist.all_gather(everyone, mine)
        clocks = torch.cat(everyone)
        spreads.append(float(clocks.max() - clocks.min()))
    skew = min(spreads)
    found = f"{skew * 1e3:.1f} ms apart"
    if skew > _LARGEST_SKEW_SECONDS:
        return fail("clocks", found, "synchronise the machines' clocks (chrony, ntpd): agents compare times")
    if skew > _SKEW_SECONDS:
        return warn("clocks", found, "synchronise the machines' clocks (chrony, ntpd)")
    return ok("clocks", found)
