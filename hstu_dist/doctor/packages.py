"""Whether the installed packages are the ones that fit together, and whether they load; no torch in this process."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata

from hstu_dist.doctor.finding import Finding, fail, ok, warn

# bound to each other's binary interface; of fbgemm one of two is there
_TOGETHER = ("torch", "torchrec", "triton", "fbgemm-gpu-cpu", "fbgemm-gpu")
_PIN = re.compile(r"([A-Za-z0-9_-]+)==([\w.]+)")
_LOAD_SECONDS = 180.0

# exit codes say how far it came; the last line says why
_LOADS = """
import torch
import fbgemm_gpu
lengths = torch.tensor([2, 1])
offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
assert offsets.tolist() == [0, 2, 3]
import torchrec
print(torch.__version__, "CUDA", torch.version.cuda or "none")
"""
_CUDA = """
import torch, torch.distributed as dist
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
nccl = ".".join(map(str, torch.cuda.nccl.version())) if names and dist.is_nccl_available() else "none"
print(f"gloo {dist.is_gloo_available()}|{torch.version.cuda or ''}|{nccl}|{', '.join(names)}")
"""
_TRITON = "import triton, triton.language; print(triton.__version__)"


def package_checks() -> dict[str, Callable[[], Finding]]:
    """All of them by name."""
    return {
        "python": _python,
        "versions": _versions,
        "torch, fbgemm and torchrec load": _loads,
        "triton loads": _triton,
        "native kernels": _native,
        "devices": _devices,
    }


def _python() -> Finding:
    return ok("python", f"{sys.version.split()[0]}, {sys.executable}")


def _versions() -> Finding:
    installed = {name: version for name in _TOGETHER if (version := _version(name)) is not None}
    found = ", ".join(f"{name} {version}" for name, version in installed.items())
    try:
        required = " ".join(metadata.requires("hstu-dist") or ())
    except metadata.PackageNotFoundError:
        return warn(
            "versions", f"{found}; this package is not installed, so that nothing says what fits", "make clean install"
        )
    wrong = [
        f"{name} {installed[name]} instead of {wanted}"
        for name, wanted in _PIN.findall(required)
        if name in installed and installed[name].partition("+")[0] != wanted
    ]
    missing = [name for name in ("torch", "torchrec") if name not in installed]
    if not {"fbgemm-gpu", "fbgemm-gpu-cpu"} & set(installed):
        missing.append("fbgemm-gpu or fbgemm-gpu-cpu")
    if wrong or missing:
        problem = "; ".join([*wrong, *(f"{name} is missing" for name in missing)])
        return fail("versions", problem, "torch, torchrec, fbgemm and triton change together only: make clean install")
    return ok("versions", found)


def _loads() -> Finding:
    name = "torch, fbgemm and torchrec load"
    code, said = _python_says(_LOADS)
    if code == 0:
        return ok(name, f"torch {said}")
    remedy = "fbgemm and torchrec must be built for this torch: install the versions of pyproject.toml together"
    if "undefined symbol" in said or "cannot open shared object" in said:
        return fail(name, f"binary interfaces do not match ({said})", remedy)
    return fail(name, said, remedy)


def _triton() -> Finding:
    code, said = _python_says(_TRITON)
    if code == 0:
        return ok("triton loads", said)
    return warn("triton loads", said, "needed on GPUs only: pip install the version that pyproject.toml names")


def _native() -> Finding:
    code, said = _python_says("from hstu_dist.ops import native; print('loaded')")
    if code == 0:
        return ok("native kernels", said)
    remedy = "training on CPUs is slower without: install a C++ compiler, then make clean install"
    return warn("native kernels", said, remedy)


def _devices() -> Finding:
    code, said = _python_says(_CUDA)
    if code != 0:
        return fail("devices", said, "mend the loading of torch first")
    gloo, cuda, nccl, names = said.split("|")
    if gloo != "gloo True":
        return fail("devices", "this torch has no gloo", "install a torch with distributed support")
    if names:
        return ok("devices", f"{names}; CUDA {cuda}, NCCL {nccl}, gloo")
    if shutil.which("nvidia-smi") is None:
        return ok("devices", "CPU, gloo")
    if not cuda:
        return fail(
            "devices", "a GPU driver is here, but this torch is built for CPUs", "make clean install EXTRA=cuda"
        )
    return fail(
        "devices", f"torch for CUDA {cuda} finds no GPU", "compare with the driver's CUDA version in nvidia-smi"
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _python_says(code: str) -> tuple[int, str]:
    """Exit code and last line of a Python of its own: a broken library may end the process that loads it."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=_LOAD_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return 1, f"does not answer within {_LOAD_SECONDS:g} s"
    if done.returncode < 0:
        return done.returncode, f"ends with signal {-done.returncode}"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode, lines[-1].strip() if lines else "nothing"
