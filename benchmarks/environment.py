"""What a measurement was made on: chip, threads, commit, date and versions."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import hstu_dist

ROOT = Path(__file__).parent.parent
"""Root of the repository."""

RESULTS = ROOT / "benchmarks" / "results"
"""Where committed result files and plots lie."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The fields of a result file that describe the measuring machine; see `hstu_dist.report.results.Results`."""

    date: str
    commit: str
    device: str
    threads: int
    versions: dict[str, str]


def describe(device: torch.device) -> Environment:
    """The environment of a measurement that runs now on `device`."""
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        device=device_name(device),
        threads=torch.get_num_threads(),
        versions=versions(),
    )


def device_name(device: torch.device) -> str:
    """The chip's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    name = names[0].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def device_slug(device: torch.device) -> str:
    """`cpu`, or the GPU's short name for file names: `NVIDIA H100 80GB HBM3` gives `h100`."""
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device)
    model = re.search(r"\b[A-Z]+\d+\w*\b", name)
    return re.sub(r"[^a-z0-9]+", "_", (model[0] if model else name).lower()).strip("_")


def commit() -> str:
    """The checked-out commit, `+changes` added if the tree differs from it, or `unknown` outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        # result files change with every measurement: they are not what is measured
        changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changes else "")


def source_hash() -> str:
    """Of everything that can change a measurement: the package, its kernels, the benchmarks."""
    digest = hashlib.sha256()
    for folder in ("hstu_dist", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".so") and path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a timing."""
    found = {"python": platform.python_version(), "hstu_dist": hstu_dist.__version__, "torch": torch.__version__}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    with contextlib.suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return found
