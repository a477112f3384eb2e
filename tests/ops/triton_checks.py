"""Names of the checks that `triton_worker` makes, without loading Triton."""

from __future__ import annotations

from tests.ops.cases import CASES

HALF_CASES = ("odd-lengths", "widths-differ", "all-masks", "cached-targets", "softmax-targets")

OTHERS = ("times centuries apart", "window of 1", "near buckets", "far buckets", "far sequences")

NAMES = (*(f"float32 {case.name}" for case in CASES), *(f"float16 {name}" for name in HALF_CASES), *OTHERS)
