"""Random calls of the C library without torch, for a run under sanitizers: python native_fuzz.py LIBRARY CALLS SEED.

Every tensor is its own allocation of the exact size, so that a single element too far is caught. The instruction sets
must agree with each other; that they are right is for the other tests.
"""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_dist.ops.native_abi import Call, Status, open_library, supported

Array = NDArray[Any]

THRESHOLDS = np.array([math.ceil(math.exp(0.301 * b)) for b in range(1, 129)], dtype=np.int64)


class Arena:
    """Allocations of one call, each of exactly its size."""

    def __init__(self) -> None:
        self.alive: list[Any] = []

    def put(self, values: Array) -> int | None:
        """Address of a copy; null for an empty array, as PyTorch has it."""
        if values.size == 0:
            return None
        copy = (ctypes.c_char * values.nbytes).from_buffer_copy(values.tobytes())
        self.alive.append(copy)
        return ctypes.addressof(copy)

    def rows(self, rng: np.random.Generator, rows: int, width: int, dtype: str) -> tuple[int | None, int]:
        """Address and stride of rows that may lie apart; the last row ends the allocation."""
        stride = width + int(rng.integers(0, 2)) * int(rng.integers(0, 9))
        return self.put(rng.standard_normal(max(0, (rows - 1) * stride + width) if rows else 0).astype(dtype)), stride

    def result(self, size: int, dtype: str) -> tuple[int | None, Array]:
        """Address of a result full of NaN, and the array that shows it."""
        address = self.put(np.full(size, np.nan, dtype))
        return address, np.frombuffer(self.alive[-1], dtype) if size else np.empty(0, dtype)


def random_lengths(rng: np.random.Generator) -> dict[str, Array]:
    """Queries, keys, contextual tokens and targets of a few sequences, mostly short."""
    batch = int(rng.integers(0, 4))
    longest = int(rng.choice([3, 20, 70, 140], p=[0.5, 0.3, 0.15, 0.05]))
    queries = rng.integers(0, longest + 1, batch)
    keys = queries + rng.integers(0, longest + 1, batch) * rng.integers(0, 2)
    targets = rng.integers(0, keys + 1) * rng.integers(0, 2)
    contextual = rng.integers(0, keys - targets + 1) * rng.integers(0, 2)
    return {"queries": queries, "keys": keys, "targets": targets, "contextual": contextual}


def random_times(rng: np.random.Generator, count: int) -> Array:
    """Times that repeat, or that span all of int64."""
    limit = int(rng.choice([3, 10**6, 2**62]))
    return np.sort(rng.integers(-limit, limit, count)) if rng.integers(0, 2) else rng.integers(-limit, limit, count)


def random_call(rng: np.random.Generator, arena: Arena) -> tuple[Call, dict[str, Array]]:
    """A call with random features, and its results by name."""
    n = random_lengths(rng)
    batch, rows, key_rows = len(n["queries"]), int(n["queries"].sum()), int(n["keys"].sum())
    heads, q_width, v_width = (int(rng.integers(1, limit)) for limit in (4, 36, 36))
    dtype = str(rng.choice(["float32", "float64"]))
    call = Call(bytes=ctypes.sizeof(Call), threads=int(rng.integers(1, 3)), is_double=dtype == "float64")
    call.batch, call.heads, call.q_width, call.v_width = batch, heads, q_width, v_width
    call.is_softmax, call.alpha, call.normalizer = int(rng.integers(0, 2)), 0.3, 7.0
    call.window, call.global_prefix = (int(rng.integers(0, 2) * rng.integers(0, 50)) for _ in range(2))
    call.q, call.q_stride = arena.rows(rng, rows, heads * q_width, dtype)
    call.k, call.k_stride = arena.rows(rng, key_rows, heads * q_width, dtype)
    call.v, call.v_stride = arena.rows(rng, key_rows, heads * v_width, dtype)
    call.offsets = arena.put(np.concatenate([[0], n["queries"].cumsum()]).astype(np.int64))
    call.key_offsets = arena.put(np.concatenate([[0], n["keys"].cumsum()]).astype(np.int64))
    call.num_targets = arena.put(n["targets"].astype(np.int64))
    call.num_contextual = arena.put(n["contextual"].astype(np.int64))
    call.grad_out = arena.put(rng.standard_normal(rows * heads * v_width).astype(dtype))
    results = {"out": (rows * heads * v_width, dtype), "lse": (heads * rows * call.is_softmax, "float64")}
    results |= {"grad_q": (rows * heads * q_width, dtype), "grad_k": (key_rows * heads * q_width, dtype)}
    results |= {"grad_v": (key_rows * heads * v_width, dtype)}
    if rng.integers(0, 3):
        call.table_length = max(1, int(n["keys"].max(initial=0))) + int(rng.integers(0, 3))
        call.position_weight = arena.put(rng.standard_normal(2 * call.table_length - 1).astype(dtype))
        results["grad_position"] = (2 * call.table_length - 1, "float64")
    if rng.integers(0, 3):
        call.time_weight = arena.put(rng.standard_normal(129).astype(dtype))
        call.query_times = arena.put(random_times(rng, rows).astype(np.int64))
        call.key_times = arena.put(random_times(rng, key_rows).astype(np.int64))
        call.time_thresholds = arena.put(THRESHOLDS)
        results["grad_time"] = (129, "float64")
    shown = {}
    for name, (size, kind) in results.items():
        address, shown[name] = arena.result(size, kind)
        setattr(call, name, address)
    return call, shown


def fuzz(library: ctypes.CDLL, calls: int, seed: int) -> None:
    """Raises AssertionError at the first call whose results are not finite or depend on the instruction set."""
    rng = np.random.default_rng(seed)
    isas = supported(library)
    for i in range(calls):
        arena = Arena()
        call, shown = random_call(rng, arena)
        first: dict[str, Array] = {}
        # all of them on every tenth call, otherwise one in turn
        for isa in isas if i % 10 == 0 else [isas[i % len(isas)]]:
            call.isa = isa
            if call.is_softmax and (call.position_weight or call.time_weight):
                rows = shown["lse"].size
                call.row_sums, call.row_claims = arena.put(np.zeros(2 * rows)), arena.put(np.zeros(rows, np.int32))
            for function in (library.hstu_forward, library.hstu_backward):
                assert function(ctypes.byref(call)) == Status.OK, f"call {i}"
            for name, values in shown.items():
                assert np.isfinite(values).all(), f"call {i}, {isa.name}: {name} is not finite"
                want = first.setdefault(name, values.copy())
                size = max(1.0, float(np.abs(want).max(initial=0.0)))
                np.testing.assert_allclose(
                    values, want, rtol=0, atol=2e-4 * size, err_msg=f"call {i} {isa.name} {name}"
                )
    # the struct of another version, and an instruction set that does not exist, are refused
    call = Call(bytes=8)
    assert library.hstu_forward(ctypes.byref(call)) == Status.BAD_CALL
    call = Call(bytes=ctypes.sizeof(Call), isa=99)
    assert library.hstu_backward(ctypes.byref(call)) == Status.BAD_CALL


if __name__ == "__main__":
    fuzz(open_library(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
