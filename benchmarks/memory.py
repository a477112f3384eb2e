"""Peak extra memory of a step."""

from __future__ import annotations

import logging
import multiprocessing
import re
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from benchmarks.harness import Step

log = logging.getLogger(__name__)

Build = Callable[[], Step]
"""Makes a step's inputs and returns the step; must be picklable (a partial of a module's function)."""

MEGABYTE = 1e6

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak_extra_mb(build: Build, rehearsal: Build, device: torch.device) -> float | None:
    """How far memory rises above the inputs during one step, outputs and gradients included.

    On a CPU the step runs in a process of its own, so that neither earlier peaks nor memory kept by the
    allocator hide its own; on a GPU torch's allocator keeps the account.

    Args:
        build: the step to measure.
        rehearsal: a tiny step of the same kind, run first: libraries and thread pools load once, and are
            not what the step costs.
        device: where the step runs.

    Returns:
        Megabytes (1e6 bytes), or None with a log line where the process died or the system does not tell.
    """
    if device.type == "cuda":
        return _cuda_peak(build, rehearsal)
    if not (_STATUS.exists() and _RESET.exists()):
        log.warning("peak memory: not measured, %s is missing on this system", _RESET)
        return None
    # spawned, not forked: a forked process starts with its parent's memory
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_process_peak, build, rehearsal, torch.get_num_threads()).result()
        except BrokenProcessPool:
            log.warning("peak memory: not measured, the process was killed (too little memory?)")
            return None


def _process_peak(build: Build, rehearsal: Build, threads: int) -> float:
    torch.set_num_threads(threads)
    rehearsal()()
    step = build()
    # sets the high-water mark back to the current size; getrusage cannot, and starts at the parent's
    _RESET.write_text("5")
    before = _kilobytes("VmRSS")
    result = step()
    peak = _kilobytes("VmHWM")
    del result
    return (peak - before) * 1024 / MEGABYTE


@contextmanager
def memory_limited(device: torch.device) -> Iterator[None]:
    """Lets allocations fail inside the block before the system runs out of memory and kills the process.

    A GPU's allocator does so by itself; on a CPU Linux hands out more than it has. What is free now is the limit.
    """
    if device.type == "cuda" or not _STATUS.exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = _kilobytes("VmData") * 1024 + psutil.virtual_memory().available
    hard = before[1]
    resource.setrlimit(resource.RLIMIT_DATA, (allowed if hard == resource.RLIM_INFINITY else min(allowed, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _kilobytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), flags=re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS}: got no field {field}, expected the kernel to give it")
    return int(found[1])


def high_water_mark() -> int:
    """Largest resident size in bytes that this process ever had."""
    return _kilobytes("VmHWM") * 1024


def _cuda_peak(build: Build, rehearsal: Build) -> float:
    rehearsal()()
    step = build()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / MEGABYTE
