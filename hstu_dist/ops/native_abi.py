"""The C interface of the native kernels as ctypes sees it, without torch; csrc/*.h are the other half."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from pathlib import Path


class Isa(IntEnum):
    """Instruction sets of the library; AUTO is the widest one that the machine has."""

    AUTO = 0
    PORTABLE = 1
    AVX2 = 2
    AVX512 = 3


class Status(IntEnum):
    """What a call of the library returns."""

    OK = 0
    OUT_OF_MEMORY = 1
    BAD_CALL = 2


class Call(ctypes.Structure):
    """HstuCall, field by field; pointers left out are null."""

    _fields_ = (
        ("bytes", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("threads", "isa", "is_double", "is_softmax")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "q_width", "v_width")),
        *((name, ctypes.c_int64) for name in ("window", "global_prefix", "table_length")),
        *((name, ctypes.c_double) for name in ("alpha", "normalizer")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, ctypes.c_void_p) for name in ("offsets", "key_offsets", "num_contextual", "num_targets")),
        *((name, ctypes.c_void_p) for name in ("position_weight", "time_weight", "query_times", "key_times")),
        *((name, ctypes.c_void_p) for name in ("time_thresholds", "out", "lse", "row_sums", "row_claims", "grad_out")),
        *((name, ctypes.c_void_p) for name in ("grad_q", "grad_k", "grad_v", "grad_position", "grad_time")),
    )


class RowOperation(IntEnum):
    """What the row kernels compute; csrc/rows.h has the operands of each."""

    NORMALIZE = 0
    NORMALIZE_BACKWARD = 1
    SILU = 2
    SILU_BACKWARD = 3
    GATE = 4
    GATE_BACKWARD = 5
    DROP = 6
    DRAW = 7


MAX_PARTS = 4


class Rows(ctypes.Structure):
    """HstuRows, field by field; csrc/rows.h is the other half."""

    _fields_ = (
        ("bytes", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("threads", "isa", "is_double", "operation")),
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        ("part_width", ctypes.c_int64 * MAX_PARTS),
        ("epsilon", ctypes.c_double),
        ("input", ctypes.c_void_p * (1 + MAX_PARTS)),
        ("input_stride", ctypes.c_int64 * (1 + MAX_PARTS)),
        ("output", ctypes.c_void_p * 2),
        ("output_stride", ctypes.c_int64 * 2),
        ("tokens", ctypes.c_void_p),
        ("key", ctypes.c_int64),
        ("threshold", ctypes.c_int32),
        ("scale", ctypes.c_double),
        ("high", ctypes.c_int64),
        ("integers", ctypes.c_void_p),
    )


class SoftmaxLoss(ctypes.Structure):
    """HstuLoss, field by field; csrc/loss.h is the other half."""

    _fields_ = (
        ("bytes", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("threads", "isa", "is_double", "is_full")),
        *((name, ctypes.c_int64) for name in ("positions", "candidates", "negatives", "width", "stride")),
        *((name, ctypes.c_double) for name in ("temperature", "shift")),
        *((name, ctypes.c_void_p) for name in ("queries", "items", "positive", "negative")),
        *((name, ctypes.c_void_p) for name in ("loss", "grad_queries", "grad_items")),
    )


def open_library(path: Path) -> ctypes.CDLL:
    """The loaded library, its functions typed.

    Raises:
        ImportError: there is no such file, or it does not load on this machine.
    """
    if not path.is_file():
        raise ImportError(f"{path.name} is missing: there was no working C++ compiler when hstu_dist was installed")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"{path.name} does not load: {error}") from error
    structs = {"hstu_forward": Call, "hstu_backward": Call, "hstu_rows": Rows, "hstu_softmax_loss": SoftmaxLoss}
    for name, struct in structs.items():
        function = getattr(library, name)
        function.argtypes = [ctypes.POINTER(struct)]
        function.restype = ctypes.c_int32
    library.hstu_best_isa.argtypes = []
    library.hstu_best_isa.restype = ctypes.c_int32
    return library


def supported(library: ctypes.CDLL) -> list[Isa]:
    """Instruction sets that run on this machine, narrowest first."""
    best = library.hstu_best_isa()
    return [isa for isa in Isa if Isa.AUTO < isa <= best]
