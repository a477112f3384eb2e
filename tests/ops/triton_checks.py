"""Names of the checks that `triton_worker` makes, without loading Triton."""

from __future__ import annotations

from tests.ops.cases import CASES

HALF_CASES = ("odd-lengths", "widths-differ", "all-masks", "cached-targets", "softmax-targets")

OTHERS = (
    "times centuries apart",
    "window of 1",
    "near buckets",
    "far buckets",
    "far sequences",
    "bfloat16 arithmetic",
    "bfloat16 errors are seen",
)

NAMES = (
    *(f"float32 {case.name}" for case in CASES),
    *(f"{dtype} {name}" for dtype in ("float16", "bfloat16") for name in HALF_CASES),
    *OTHERS,
)
