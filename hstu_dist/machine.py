"""What a rank has to work with: cores and memory of this machine, peak rates of known GPUs; no torch."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Literal

import psutil

Precision = Literal["float32", "tf32", "bfloat16"]
"""Arithmetic of a matrix product: float32 throughout, float32 rounded to TF32 on the way in, or bfloat16."""

_PEAKS: dict[str, dict[Precision, float]] = {
    # most specific first; makers' data sheets, dense, without the doubling by structured sparsity
    "A100": {"float32": 19.5e12, "tf32": 156e12, "bfloat16": 312e12},
    "H100 PCIe": {"float32": 51e12, "tf32": 378e12, "bfloat16": 756e12},
    "H100 NVL": {"float32": 60e12, "tf32": 417.5e12, "bfloat16": 835.5e12},
    "H100": {"float32": 67e12, "tf32": 494.5e12, "bfloat16": 989.5e12},
    "H200 NVL": {"float32": 60e12, "tf32": 417.5e12, "bfloat16": 835.5e12},
    "H200": {"float32": 67e12, "tf32": 494.5e12, "bfloat16": 989.5e12},
    "B200": {"float32": 75e12, "tf32": 1125e12, "bfloat16": 2250e12},
    "MI300X": {"float32": 163.4e12, "tf32": 653.7e12, "bfloat16": 1307.4e12},
}

# names and values from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def gpu_peak_flops(name: str, precision: Precision) -> float | None:
    """FLOP/s of dense matrix products that the maker's data sheet promises; None for a GPU that is not listed.

    Args:
        name: as the driver calls it, such as `NVIDIA H100 80GB HBM3`.
        precision: arithmetic of the products.
    """
    # a slice of a GPU carries the whole one's name
    if re.search(r"\bMIG\b", name):
        return None
    known = (peaks for model, peaks in _PEAKS.items() if re.search(rf"\b{model}\b", name))
    return next((peaks[precision] for peaks in known), None)


def cores_per_rank(local_ranks: int) -> int:
    """Cores that this process may use, shared among the ranks of the machine; at least 1."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // local_ranks)


def memory_per_rank(local_ranks: int) -> int:
    """Bytes of this machine's memory, shared among its ranks."""
    return int(psutil.virtual_memory().total) // local_ranks


def oom_kills() -> int:
    """Processes that the kernel of this machine has ended for want of memory since it started; 0 if it does not say."""
    try:
        counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(counters.get("oom_kill", 0))


def keep_freed_memory() -> None:
    """Lets this process keep freed memory for its next allocation, where the C library is glibc.

    By default glibc returns large blocks to the system, or not, depending on what the process freed before. Every
    step of a training on a CPU would fault the same pages in again, a quarter of its time on MovieLens-1M; and
    benchmarks would depend on whose turn came before.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
