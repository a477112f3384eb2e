"""No random call makes the native kernels touch memory that is not theirs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def hatch_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitizer_runtime(compiler: list[str]) -> str | None:
    """Path of libasan, to be loaded before the interpreter's own libraries."""
    result = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    path = Path(result.stdout.strip())
    return str(path) if path.is_absolute() and path.is_file() else None


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library with checks of every access, and the runtime that it needs."""
    build = hatch_build()
    compiler = build.find_compiler()
    runtime = None if compiler is None else sanitizer_runtime(compiler)
    if runtime is None:
        pytest.skip("needs a C++ compiler with AddressSanitizer")
    library = tmp_path_factory.mktemp("sanitized") / "libhstu_native.so"
    build.build(compiler, library, ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
    return library, runtime


CALLS = {"native_fuzz.py": 2_000, "softmax_fuzz.py": 500}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the library is built on Linux only")
@pytest.mark.parametrize("more", [1, pytest.param(20, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("script", CALLS)
def test_random_calls_under_sanitizers(script: str, more: int, sanitized: tuple[Path, str]) -> None:
    library, runtime = sanitized
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": runtime,
        "PYTHONMALLOC": "malloc",
        # memory that nobody wrote is NaN
        "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255",
        # threads that wait should not spin: the sanitizers make them wait a lot
        "OMP_WAIT_POLICY": "passive",
    }
    command = [sys.executable, str(ROOT / "tests/ops" / script), str(library), str(more * CALLS[script]), str(more)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
