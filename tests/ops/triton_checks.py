"""Names of the checks that `triton_worker` makes, without loading Triton."""

from __future__ import annotations

from tests.ops.cases import CASES

HALF_CASES = ("widths-differ", "softmax-targets")
MORE_HALF_CASES = ("odd-lengths", "all-masks", "cached-targets")

OTHERS = (
    "times centuries apart",
    "window of 1",
    "near buckets",
    "far buckets",
    "far sequences",
    "bfloat16 arithmetic",
    "bfloat16 errors are seen",
)


def _half(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{dtype} {name}" for dtype in ("float16", "bfloat16") for name in names)


NAMES = (*(f"float32 {case.name}" for case in CASES), *_half(HALF_CASES), *OTHERS)

MORE_NAMES = _half(MORE_HALF_CASES)
"""Masks that float32 meets too, in other types: for longer runs."""
