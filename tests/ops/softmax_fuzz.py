"""Random softmax losses without torch, for a run under sanitizers: python softmax_fuzz.py LIBRARY CALLS SEED.

As native_fuzz.py: allocations of the exact size, and instruction sets that must agree with each other.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_dist.ops.native_abi import SoftmaxLoss, Status, open_library, supported
from tests.ops.native_fuzz import Arena

Array = NDArray[Any]


def random_call(rng: np.random.Generator, arena: Arena) -> tuple[SoftmaxLoss, dict[str, Array]]:
    """A call of random sizes, and its results by name."""
    longest = int(rng.choice([4, 70, 300], p=[0.5, 0.4, 0.1]))
    positions, negatives, width = (int(rng.integers(0, n)) for n in (longest, longest, 70))
    candidates, width = int(rng.integers(1, longest + 1)), width + 1
    stride = width + -width % 16
    dtype = str(rng.choice(["float32", "float64"]))
    call = SoftmaxLoss(bytes=ctypes.sizeof(SoftmaxLoss), threads=int(rng.integers(1, 3)), is_double=dtype == "float64")
    call.positions, call.candidates, call.negatives = positions, candidates, negatives
    call.width, call.stride, call.temperature, call.shift = width, stride, 2.0, 0.3
    items = np.zeros((candidates, stride), dtype)
    items[:, :width] = rng.standard_normal((candidates, width))
    call.queries, call.items = arena.put(rng.standard_normal(positions * width).astype(dtype)), arena.put(items)
    call.positive = arena.put(rng.integers(0, candidates, positions))
    call.is_full = int(rng.integers(0, 2))
    if not call.is_full:
        call.negative = arena.put(rng.integers(0, candidates, positions * negatives))
    shown = {}
    call.loss, shown["loss"] = arena.result(1, "float64")
    call.grad_queries, shown["grad_queries"] = arena.result(positions * width, dtype)
    call.grad_items, shown["grad_items"] = arena.result(candidates * stride, dtype)
    return call, shown


def fuzz(library: ctypes.CDLL, calls: int, seed: int) -> None:
    """Raises AssertionError at the first call whose results are not finite or depend on the instruction set."""
    rng = np.random.default_rng(seed)
    for i in range(calls):
        arena = Arena()
        call, shown = random_call(rng, arena)
        first: dict[str, Array] = {}
        for isa in supported(library):
            call.isa = isa
            ctypes.memset(call.grad_items, 0, shown["grad_items"].nbytes)
            assert library.hstu_softmax_loss(ctypes.byref(call)) == Status.OK, f"call {i}"
            for name, values in shown.items():
                assert np.isfinite(values).all(), f"call {i}, {isa.name}: {name} is not finite"
                want = first.setdefault(name, values.copy())
                size = max(1.0, float(np.abs(want).max(initial=0.0)))
                np.testing.assert_allclose(
                    values, want, rtol=0, atol=2e-4 * size, err_msg=f"call {i} {isa.name} {name}"
                )
    # the struct of another version, an instruction set that does not exist, rows that are no whole vectors
    good = {"bytes": ctypes.sizeof(SoftmaxLoss), "stride": 16, "width": 16}
    for wrong in ({"bytes": 8}, {"isa": 99}, {"stride": 17}, {"width": 17}):
        call = SoftmaxLoss(**{**good, **wrong})
        assert library.hstu_softmax_loss(ctypes.byref(call)) == Status.BAD_CALL, wrong


if __name__ == "__main__":
    fuzz(open_library(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
