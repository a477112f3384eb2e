"""Cores, memory, network interfaces and folders of one machine; no torch."""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from hstu_dist.config import RunConfig
from hstu_dist.data.config import prepare_command
from hstu_dist.data.schema import load_manifest
from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.data.stream.source import check_reachable
from hstu_dist.doctor.finding import Finding, ok, warn
from hstu_dist.errors import UserError
from hstu_dist.machine import cores_per_rank

_PROBE_BYTES = 64 << 20
_SLOW_DISK = 50e6
"""Bytes a second below which checkpoints, which all ranks wait for, take longer than they should."""
_LEAST_SHARED_MEMORY = 1 << 30


def machine_checks(config: RunConfig) -> dict[str, Callable[[], Finding]]:
    """All of them by name, for a run's folders."""
    return {
        "cores and memory": lambda: _cores(config),
        "network interfaces": _interfaces,
        "data folder": lambda: _data(config),
        "run folder": lambda: _writable(Path(config.output)),
        "disk": lambda: _disk(Path(config.output)),
    }


def _cores(config: RunConfig) -> Finding:
    memory, cores = psutil.virtual_memory(), len(os.sched_getaffinity(0))
    found = f"{cores} cores, {memory.total / 2**30:.1f} GiB of memory, {memory.available / 2**30:.1f} available"
    if cores < config.nproc:
        return warn("cores and memory", f"{found}, for {config.nproc} ranks", f"use nproc={cores} or fewer")
    shared = Path("/dev/shm")
    if config.trainer.device != "cpu" and shared.exists():
        size = shutil.disk_usage(shared).total
        if size < _LEAST_SHARED_MEMORY:
            found += f", {size / 2**20:.0f} MiB of /dev/shm"
            return warn("cores and memory", found, "NCCL uses it between GPUs: docker run --shm-size=8g")
    return ok("cores and memory", f"{found}; {cores_per_rank(config.nproc)} threads a rank")


def _interfaces() -> Finding:
    found = [
        f"{name} {address.address}"
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    ]
    name = socket.gethostname()
    try:
        own = socket.gethostbyname(name)
    except OSError:
        return warn(
            "network interfaces",
            f"{', '.join(found)}; the machine's own name {name} has no address",
            "add it to /etc/hosts, or start several machines with cluster.interface=NAME",
        )
    if own.startswith("127."):
        return ok("network interfaces", f"{', '.join(found)}; {name} is {own}, which other machines cannot reach")
    return ok("network interfaces", f"{', '.join(found)}; {name} is {own}")


def _data(config: RunConfig) -> Finding:
    try:
        if isinstance(config.data, StreamConfig):
            check_reachable(config.data.path)
            return ok("data folder", f"{config.data.path}: a stream, which can be reached")
        manifest = load_manifest(Path(config.data.path), prepare_command(config.data))
    except UserError as error:
        return warn("data folder", error.problem, error.remedy)
    return ok("data folder", f"{config.data.path}: {manifest.num_users} users, {manifest.num_items} items")


def _writable(folder: Path) -> Finding:
    # process ids of containers are the same on all machines
    probe = folder / f".doctor-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"probe")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror})", "set output=FOLDER to a writable one, or mend its owner"
        ) from error
    return ok("run folder", f"{folder.absolute()}: writable, {shutil.disk_usage(folder).free / 2**30:.1f} GiB free")


def _disk(folder: Path) -> Finding:
    """Rate of one process that writes to disk and reads back, through the cache where there is one."""
    if shutil.disk_usage(folder).free < 4 * _PROBE_BYTES:
        return warn("disk", "too little space to measure its rate", "free some space")
    probe, block = folder / f".doctor-{uuid.uuid4().hex}", os.urandom(1 << 20)
    try:
        started = time.perf_counter()
        with probe.open("wb", buffering=0) as file:
            for _ in range(_PROBE_BYTES // len(block)):
                file.write(block)
            os.fsync(file.fileno())
        written = _PROBE_BYTES / (time.perf_counter() - started)
        started = time.perf_counter()
        probe.read_bytes()
        read = _PROBE_BYTES / (time.perf_counter() - started)
    finally:
        probe.unlink(missing_ok=True)
    found = f"writes {written / 1e6:.0f} MB/s to disk, reads {read / 1e6:.0f} MB/s (cached)"
    if written < _SLOW_DISK:
        return warn("disk", found, "set output=FOLDER to a faster disk, or trainer.checkpoint.asynchronous=true")
    return ok("disk", found)
