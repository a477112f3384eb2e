"""Runs checks of the Triton kernels in Triton's interpreter and prints what is wrong with each, as JSON lines.

A process of its own, because Triton decides between compiling and interpreting once, when it is imported:

    TRITON_INTERPRET=1 python -m tests.ops.triton_worker NAME [NAME ...]
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import triton
import triton.language as tl

from hstu_dist.ops.bias import time_bucket
from hstu_dist.ops.spec import AttentionSpec, Backend
from hstu_dist.ops.triton.arguments import Bias, Line, Sequences, Variant
from hstu_dist.ops.triton.launch import bucket_thresholds
from hstu_dist.ops.triton.tiles import side
from hstu_dist.ops.triton.times import base_time, far_kernel, time_buckets
from tests.ops.cases import CASES, Case, assert_close_to_reference, problem
from tests.ops.interpret_bfloat16 import mended
from tests.ops.triton_checks import HALF_CASES, MORE_HALF_CASES, MORE_NAMES, NAMES

OWN_KEY_ONLY = AttentionSpec(normalizer=3.0, window=1)
YEARS_100 = 100 * 365 * 86_400


def parity(case: Case, dtype: torch.dtype, stretch: int = 1) -> None:
    """Output and gradients against the reference; `stretch` multiplies all times."""
    p = problem(case)
    p = replace(p, query_times=p.query_times * stretch, key_times=p.key_times * stretch)
    assert_close_to_reference(p, p.run(Backend.TRITON, dtype), dtype)


@triton.jit
def _bucket_kernel(bias, out, queries, keys, V: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * V.keys.rows
    row = start * 0
    base = base_time(bias.query_times, row)
    query = side(bias.query_times, base, 0, row, queries, V.queries)
    key = side(bias.key_times, base, 0, start, keys - start, V.keys)
    r = tl.arange(0, V.queries.rows)[:, None]
    c = start + tl.arange(0, V.keys.rows)[None, :]
    tl.store(out + r * keys + c, time_buckets(query, key, bias, V), mask=(r < queries) & (c < keys))


def buckets(far: bool) -> None:
    """Time buckets equal `bias.time_bucket`, at every threshold and power of two and one second beside them."""
    thresholds = bucket_thresholds(torch.device("cpu"))
    edges = torch.cat([thresholds, 2 ** torch.arange(61)])
    elapsed = torch.cat([edges - 1, edges, edges + 1, torch.randint(0, 2**31, (1000,))])
    if not far:
        elapsed = elapsed[elapsed < 2**31 - 1]
    for key_times in (elapsed, -elapsed):
        query_times = torch.zeros(4, dtype=torch.int64)
        if far:
            query_times[1:] = torch.randint(-(2**60), 2**60, (3,))
        got = torch.empty(4, key_times.numel(), dtype=torch.int32)
        bias = Bias(None, 0, None, thresholds, query_times, key_times)
        variant = _variant(queries=Line(4, True), keys=Line(256, False), far=far)
        _bucket_kernel[(-(-key_times.numel() // 256),)](bias, got, 4, key_times.numel(), variant)
        wrong = got != time_bucket(query_times[:, None] - key_times[None, :])
        assert not wrong.any(), f"{int(wrong.sum())} buckets differ"


def _variant(queries: Line, keys: Line, far: bool) -> Variant:
    fields = dict.fromkeys(("q", "k", "v", "out", "softmax", "window", "prefix", "exact", "precision"))
    return Variant(queries=queries, keys=keys, far=far, **fields)  # type: ignore[arg-type]


def far_sequences() -> None:
    """A sequence is far from 2^31 - 1 seconds between two of its times on, whether of queries or keys."""
    limit = 2**31 - 1
    offsets = torch.tensor([0, 2, 4, 6, 6, 7])
    query_times = torch.tensor([0, limit - 1, -5, limit - 5, 7, 7, 10**12])
    key_times = torch.tensor([0, 3, -5, 0, 7, 7 - 2**40, 10**12])
    far = torch.empty(5, dtype=torch.int32)
    sequences = Sequences(offsets, None, None, None, far)
    far_kernel[(5,)](sequences, Bias(None, 0, None, None, query_times, key_times))
    assert far.tolist() == [0, 1, 1, 0, 0], far.tolist()


@triton.jit
def _product_kernel(a, b, c, out, N: tl.constexpr):
    r = tl.arange(0, N)
    at = r[:, None] * N + r[None, :]
    b_a = tl.load(a + at)
    product = tl.dot(b_a, tl.trans(tl.load(b + at)))
    tl.store(out + at, (product + b_a.to(tl.float32) + tl.load(c + at)).to(tl.bfloat16))


def bfloat16_arithmetic() -> None:
    """The interpreter, mended, multiplies and casts bfloat16 as PyTorch does."""
    a, c = torch.randn(32, 32).bfloat16(), torch.randn(32, 32)
    # one product a sum, so that its order does not matter
    b = torch.diag(torch.randn(32)).bfloat16()
    a[0] = 0
    # ties to the even neighbour below and above, just beyond a tie, subnormal, too large
    c[0, :6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-20), 2.0**-133, -(2.0**-130), 3.4e38])
    got = torch.empty(32, 32, dtype=torch.bfloat16)
    with mended():
        _product_kernel[(1,)](a, b, c, got, 32)
    want = (a.float() @ b.float() + a.float() + c).bfloat16()
    assert torch.equal(got, want), got[got != want]
    assert got[0, :2].tolist() == [1.0, 1 + 2**-6]


def bfloat16_parity(case: Case) -> None:
    """Parity in bfloat16."""
    with mended():
        parity(case, torch.bfloat16)


def bfloat16_errors_are_seen() -> None:
    """The criterion fails for the interpreter's own products, and for scores that are 3% too large."""
    p = problem(next(case for case in CASES if case.name == "widths-differ"))
    larger = replace(p, case=replace(p.case, spec=replace(p.case.spec, alpha=1.03)))
    with np.errstate(all="ignore"):
        wrong = {"own products": p.run(Backend.TRITON, torch.bfloat16)}
    with mended():
        wrong["alpha"] = larger.run(Backend.TRITON, torch.bfloat16)
    for name, results in wrong.items():
        try:
            assert_close_to_reference(p, results, torch.bfloat16)
        except AssertionError:
            continue
        raise AssertionError(f"{name}: not seen")


def checks() -> dict[str, Callable[[], None]]:
    by_name = {case.name: case for case in CASES}

    def halves(names: tuple[str, ...]) -> list[Callable[[], None]]:
        cases = [by_name[name] for name in names]
        float16 = [partial(parity, case, torch.float16) for case in cases]
        return [*float16, *(partial(bfloat16_parity, case) for case in cases)]

    timed = Case(name="far", lengths=(20, 0, 33))
    others = [
        partial(parity, timed, torch.float32, stretch=YEARS_100),
        partial(parity, Case(name="own", lengths=(5, 40), spec=OWN_KEY_ONLY), torch.float32),
        partial(buckets, far=False),
        partial(buckets, far=True),
        far_sequences,
        bfloat16_arithmetic,
        bfloat16_errors_are_seen,
    ]
    parities = [partial(parity, case, torch.float32) for case in CASES]
    made = [*parities, *halves(HALF_CASES), *others, *halves(MORE_HALF_CASES)]
    return dict(zip((*NAMES, *MORE_NAMES), made, strict=True))


def main(names: Sequence[str]) -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    # exp2 of a very negative score is infinite, and its reciprocal is the right zero
    warnings.filterwarnings("ignore", message="overflow encountered in exp2")
    known = checks()
    for name in names:
        torch.manual_seed(0)
        problem_found = ""
        try:
            known[name]()
        except Exception as error:
            problem_found = f"{type(error).__name__}: {error}"
        sys.stdout.write(json.dumps({"check": name, "problem": problem_found}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
