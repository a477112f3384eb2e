"""The process group of a run: one rank or many, started by torchrun or alone."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from hstu_dist.distributed.heartbeat import Heartbeat
from hstu_dist.errors import PeerLostError, UserError
from hstu_dist.machine import Precision, cores_per_rank, keep_freed_memory

_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Socket closed|[Tt]imed out (waiting|connecting)")
"""How gloo words it when another rank has gone; the exception type is a plain RuntimeError."""


_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        rank: 0 to size - 1.
        size: number of ranks.
        local_size: ranks on this machine.
        device: where this rank computes.
        heartbeat: tells the others that this rank lives; None: there are no others.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device
    heartbeat: Heartbeat | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0


@contextmanager
def process_group(device_name: str, timeout_seconds: float) -> Iterator[World]:
    """Joins the ranks that torchrun started, or forms a group of one; leaves it at the end.

    Args:
        device_name: cpu, cuda or auto (CUDA where there is one).
        timeout_seconds: how long a collective waits for the other ranks.

    Raises:
        UserError: CUDA was asked for and is not there.
        PeerLostError: a collective failed because another rank is gone or did not answer in time.
    """
    device = _device(device_name)
    backend = "nccl" if device.type == "cuda" else "gloo"
    heartbeat: Heartbeat | None = None
    try:
        beats = _join(backend, timedelta(seconds=timeout_seconds))
        try:
            rank, size = dist.get_rank(), dist.get_world_size()
            heartbeat = None if beats is None else Heartbeat(beats, rank, size)
            yield World(rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device, heartbeat)
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:
        # tells a rank that only lost another one from a rank with an error of its own
        if _LOST.search(str(error)):
            raise PeerLostError(_lost(error, heartbeat)) from error
        raise
    finally:
        if heartbeat is not None:
            heartbeat.close()


def _join(backend: str, timeout: timedelta) -> dist.Store | None:
    """Forms the group; returns a connection to the ranks' store that nothing else uses, if there are others."""
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return None
    _end_with_agent()
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    beats = store.clone() if size > 1 else None
    prefix = "beats"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # the agent's store outlives a restart of the ranks: without a prefix they would find the addresses of the dead
        attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store, prefix = dist.PrefixStore(attempt, store), f"{attempt}/beats"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return None if beats is None else dist.PrefixStore(prefix, beats)


def _end_with_agent() -> None:
    """Lets the kernel end this rank when its agent dies, where the system can: nobody else would look after it.

    Otherwise it would go on writing into the run folder beside the ranks that a new agent starts.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _lost(error: RuntimeError, heartbeat: Heartbeat | None) -> str:
    """What happened to the other ranks, as far as this one can tell."""
    waited = "imed out" in str(error)
    if heartbeat is None:
        return "the other ranks cannot be reached"
    several_machines = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
    if waited or several_machines:
        return f"{'waited in vain for another rank' if waited else 'lost another rank'}; {heartbeat.whereabouts()}"
    # the agent of this machine saw it end
    return "lost another rank"


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.device: got cuda, but this machine has no usable CUDA device", "use device=cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= gpus:
        raise UserError(
            f"more ranks than GPUs: {os.environ.get('LOCAL_WORLD_SIZE')} ranks on a machine with {gpus} usable GPUs",
            f"use nproc={gpus} or trainer.device=cpu",
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def claim_machine(threads: int | None, world: World) -> int:
    """Gives this rank its share of the machine's cores, and memory that it keeps; returns the number of threads."""
    keep_freed_memory()
    count = threads or cores_per_rank(world.local_size)
    torch.set_num_threads(count)
    return count


def claim_precision(precision: Precision, device: torch.device) -> None:
    """Sets what this process rounds float32 matrix products to: nothing, or TF32 if that is asked for.

    Raises:
        UserError: the device cannot compute in `precision`.
    """
    if device.type == "cuda":
        name, ampere = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device) >= (8, 0)
        available = precision == "float32" or ampere
    else:
        name, available = "a CPU", precision != "tf32"
    if not available:
        raise UserError(
            f"trainer.precision: got {precision}, which {name} does not have", "use trainer.precision=float32"
        )
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of a small tensor over all ranks, on every rank."""
    total = values.clone()
    dist.all_reduce(total)
    return total


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Largest values of a small tensor over all ranks, on every rank."""
    largest = values.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def gather_rows(values: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks one after the other, on every rank; ranks may have different numbers of them.

    Args:
        values: [n, ...], the same but for n on every rank.
    """
    world_size = dist.get_world_size()
    if world_size == 1:
        return values
    counts = torch.zeros(world_size, dtype=torch.int64, device=values.device)
    counts[dist.get_rank()] = values.shape[0]
    dist.all_reduce(counts)
    largest = int(counts.max())
    padded = values.new_zeros(largest, *values.shape[1:])
    padded[: values.shape[0]] = values
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])
