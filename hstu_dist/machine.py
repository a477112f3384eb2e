"""What this machine has for one rank: cores and memory; no torch."""

from __future__ import annotations

import os

import psutil


def cores_per_rank(local_ranks: int) -> int:
    """Cores that this process may use, shared among the ranks of the machine; at least 1."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // local_ranks)


def memory_per_rank(local_ranks: int) -> int:
    """Bytes of this machine's memory, shared among its ranks."""
    return int(psutil.virtual_memory().total) // local_ranks
