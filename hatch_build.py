"""Compiles the native CPU kernels when hstu_dist is installed, where the machine has a C++ compiler.

The library is optional: without a compiler, or if it fails, one line says so and the installation goes on; attention,
row-wise parts and losses then run on PyTorch alone. $CXX names the compiler; otherwise c++, g++ and clang++ are tried.

`python hatch_build.py` builds into a checkout that was installed without a compiler.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "hstu_dist" / "ops" / "csrc"
LIBRARY = ROOT / "hstu_dist" / "ops" / "libhstu_native.so"

_FLAGS = [
    *["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden"],
    *["-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi"],
]
_AVX2 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mlzcnt"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]


def find_compiler() -> list[str] | None:
    """Command of a C++ compiler, $CXX first, or None."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in ([chosen] if chosen else []) + [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    return None


_COMMON = ["isa.cpp", "attention_driver.cpp", "rows_driver.cpp", "loss_driver.cpp"]
_KERNELS = ["attention_kernel.cpp", "rows_kernel.cpp", "loss_kernel.cpp"]


def _units() -> list[tuple[str, list[str]]]:
    """Source file and flags of every object; the kernels are compiled once for each instruction set."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas: dict[str, list[str]] = {"portable": [], **({"avx2": _AVX2, "avx512": _AVX512} if x86 else {})}
    defines = ["-DHSTU_X86"] if x86 else []
    return [
        *((source, defines) for source in _COMMON),
        *((source, [*flags, f"-DHSTU_ISA={name}"]) for source in _KERNELS for name, flags in isas.items()),
    ]


def build(compiler: Sequence[str], library: Path, extra_flags: Sequence[str] = ()) -> None:
    """Compiles the library.

    Args:
        compiler: command and its leading arguments.
        library: file to write; it is replaced at once, so that running processes keep what they have loaded.
        extra_flags: given to every compilation and to the link, for example `-fsanitize=address`.

    Raises:
        RuntimeError: the compiler failed; the message is what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        objects, running = [], []
        for i, (source, flags) in enumerate(_units()):
            objects.append(str(Path(folder) / f"{i}.o"))
            command = [*compiler, *_FLAGS, *flags, *extra_flags, "-c", str(SOURCES / source), "-o", objects[-1]]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        said = [(process.communicate()[1], process.returncode) for process in running]
        for message, status in said:
            if status:
                raise RuntimeError(message.strip())
        # beside the target: a rename across file systems would not be atomic
        fresh = library.with_suffix(f".{os.getpid()}.tmp")
        link = [*compiler, "-shared", "-fopenmp", *extra_flags, *objects, "-o", str(fresh)]
        linked = subprocess.run(link, stderr=subprocess.PIPE, text=True, check=False)
        if linked.returncode:
            fresh.unlink(missing_ok=True)
            raise RuntimeError(linked.stderr.strip())
        fresh.replace(library)


def _gist(message: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = message.splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[0]).strip()


def try_build() -> bool:
    """Whether LIBRARY was built; says on standard error why not."""
    compiler = find_compiler()
    if compiler is None:
        reason = "no C++ compiler was found (set CXX or install g++)"
    elif sys.platform != "linux":
        reason = f"they are built on Linux only, not on {sys.platform}"
    else:
        try:
            build(compiler, LIBRARY)
        except (OSError, RuntimeError) as error:
            reason = f"{compiler[0]} failed: {_gist(str(error))}"
        else:
            return True
    sys.stderr.write(f"hstu_dist: native kernels not built, PyTorch serves instead: {reason}\n")
    return False


def get_build_hook() -> type:
    """The hook that hatchling looks for; imported here, so that the rest of this file needs no hatchling."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class NativeKernels(BuildHookInterface[Any]):
        """Adds the library to wheels and editable installations."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Compiles before the files are collected; `version` is "editable" or "standard"."""
            if self.target_name != "wheel" or not try_build() or version == "editable":
                return
            build_data["force_include"][str(LIBRARY)] = "hstu_dist/ops/libhstu_native.so"
            # machine code of this platform, though of no particular Python
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-linux_{platform.machine()}"

    return NativeKernels


if __name__ == "__main__":
    sys.exit(0 if try_build() else 1)
