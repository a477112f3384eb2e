"""The native kernels beyond parity: every instruction set, exact buckets, repeatable bits, threads, fallback."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hstu_dist.ops import backends
from hstu_dist.ops.attention import hstu_attention
from hstu_dist.ops.bias import RelativeBias, time_bucket
from hstu_dist.ops.call import AttentionCall
from hstu_dist.ops.native_abi import Isa, open_library, supported
from hstu_dist.ops.spec import Activation, AttentionSpec, Backend, JaggedLayout
from tests.ops.cases import CASES, Case, Problem, assert_as_exact_as_eager, assert_close_to_reference, problem

native = pytest.importorskip("hstu_dist.ops.native", exc_type=ImportError)

ISAS = supported(native.LIBRARY)
SOFTMAX = AttentionSpec(normalizer=1.0, alpha=0.25, activation=Activation.SOFTMAX)

EDGES = [
    Case(name="edges", lengths=tuple(range(68)), heads=1, width=5, value_width=7),
    Case(name="edges-softmax", lengths=(*range(1, 68, 3), 127, 128, 129), heads=1, width=17, spec=SOFTMAX),
    Case(name="blocks", lengths=(64, 65, 127, 128, 129, 193), heads=2, width=33, value_width=64),
    Case(
        name="everything",
        lengths=(9, 1, 64, 150, 31),
        cached=(30, 0, 100, 1, 64),
        contextual=(2, 0, 70, 4, 1),
        targets=(3, 1, 20, 97, 31),
        heads=3,
        spec=AttentionSpec(normalizer=37.0, window=11, global_prefix=5),
    ),
    # more heads than share one task
    Case(name="head-groups", lengths=(70, 3), heads=9, width=64, value_width=128),
]


def run_isa(p: Problem, dtype: torch.dtype, isa: Isa) -> dict[str, Tensor]:
    """As Problem.run, on one instruction set."""
    x = {n: leaf.to(dtype) for n, leaf in p.leaves.items()}
    layout = p.layout
    call = AttentionCall(
        q=x["q"],
        k=x["k"],
        v=x["v"],
        offsets=layout.offsets,
        key_offsets=layout.offsets if layout.key_offsets is None else layout.key_offsets,
        num_contextual=layout.num_contextual,
        num_targets=layout.num_targets,
        position_weight=x["position_weight"],
        time_weight=x["time_weight"],
        query_times=p.query_times,
        key_times=p.key_times,
        max_length=layout.max_length,
        max_key_length=layout.max_key_length,
        spec=p.case.spec,
    )
    out, lse = native.forward(call, isa)
    grads = native.backward(call, out, lse, p.grad_out.to(dtype), isa)
    return {"out": out, **{f"d_{n}": g for n, g in zip(p.leaves, grads, strict=True)}}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", EDGES, ids=lambda c: c.name)
@pytest.mark.parametrize("isa", ISAS, ids=lambda i: i.name)
def test_every_instruction_set_matches_the_reference(isa: Isa, case: Case, dtype: torch.dtype) -> None:
    p = problem(case)
    assert_close_to_reference(p, run_isa(p, dtype, isa), dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float64_matches_the_reference(case: Case) -> None:
    assert_as_exact_as_eager(Backend.NATIVE, torch.float64, case)


def test_random_masks_match_the_reference() -> None:
    g = torch.Generator().manual_seed(3)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    for i in range(40):
        sizes = [(draw(0, 90), draw(0, 90) if i % 2 else 0) for _ in range(draw(1, 4))]
        targets = [draw(0, n + c) // draw(1, 4) for n, c in sizes]
        contextual = [draw(0, n + c - t) // draw(1, 6) for (n, c), t in zip(sizes, targets, strict=True)]
        spec = replace(SOFTMAX if i % 3 == 0 else EDGES[0].spec, window=draw(0, 1) * draw(1, 40))
        case = Case(
            name=f"random-{i}",
            lengths=tuple(n for n, _ in sizes),
            cached=tuple(c for _, c in sizes),
            targets=tuple(targets),
            contextual=tuple(contextual),
            heads=draw(1, 3),
            width=draw(1, 20),
            value_width=draw(1, 20),
            spec=replace(spec, global_prefix=draw(0, 20)),
        )
        p = problem(case, seed=i)
        assert_close_to_reference(p, run_isa(p, torch.float64, Isa.AUTO), torch.float64)


def test_half_precision_is_computed_in_float32() -> None:
    assert_as_exact_as_eager(Backend.NATIVE, torch.bfloat16, next(c for c in CASES if c.name == "odd-lengths"))


def boundary_times() -> Tensor:
    """Elapsed times around every bucket boundary, both signs, and the extremes of int64."""
    exact = native.time_thresholds()
    extremes = torch.tensor([0, 1, -1, 2**53 + 1, 2**62, -(2**62), 2**63 - 1, -(2**63), -(2**63) + 1])
    near = torch.cat([exact - 1, exact, exact + 1])
    return torch.cat([near, -near, extremes])


def test_thresholds_are_where_the_bucket_changes() -> None:
    exact = native.time_thresholds()
    bucket = torch.arange(1, 129)
    # at least: among small integers some buckets are empty
    assert bool((time_bucket(exact) >= bucket).all())
    assert bool((time_bucket(exact - 1) < bucket).all())


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("isa", ISAS, ids=lambda i: i.name)
def test_buckets_agree_exactly(isa: Isa, shuffled: bool) -> None:
    # a window of one: query i meets only key i, so that each output shows one bucket
    elapsed = boundary_times()
    if shuffled:
        elapsed = elapsed[torch.randperm(elapsed.numel())]
    n = elapsed.numel()
    layout = JaggedLayout(torch.tensor([0, n]))
    key_times = torch.randint(-3, 3, (n,))
    call = AttentionCall(
        q=torch.zeros(n, 1, 1, dtype=torch.float64),
        k=torch.zeros(n, 1, 1, dtype=torch.float64),
        v=torch.ones(n, 1, 1, dtype=torch.float64),
        offsets=layout.offsets,
        key_offsets=layout.offsets,
        num_contextual=None,
        num_targets=None,
        position_weight=torch.zeros(2 * n - 1, dtype=torch.float64),
        time_weight=torch.arange(1.0, 130.0, dtype=torch.float64),
        query_times=elapsed + key_times,  # wraps around like the difference taken of it
        key_times=key_times,
        max_length=n,
        max_key_length=n,
        spec=AttentionSpec(normalizer=1.0, window=1),
    )
    out, lse = native.forward(call, isa)
    expected = torch.nn.functional.silu(time_bucket(elapsed).double() + 1)
    torch.testing.assert_close(out.flatten(), expected, rtol=1e-12, atol=0)
    grads = native.backward(call, out, lse, torch.ones_like(out), isa)
    slope = torch.autograd.functional.jvp(torch.nn.functional.silu, call.time_weight, torch.ones(129).double())[1]
    count = torch.bincount(time_bucket(elapsed), minlength=129)
    torch.testing.assert_close(grads.time_weight, slope * count, rtol=1e-12, atol=1e-12)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("spec", [AttentionSpec(normalizer=300.0), SOFTMAX], ids=lambda s: s.activation)
def test_same_bits_on_every_run_and_any_number_of_threads(spec: AttentionSpec) -> None:
    case = Case(name="bits", lengths=(300, 5, 130), heads=2, width=24, value_width=24, spec=spec)
    p = problem(case)
    torch.set_num_threads(1)
    first = p.run(Backend.NATIVE, torch.float32)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        for name, value in p.run(Backend.NATIVE, torch.float32).items():
            assert torch.equal(value, first[name]), f"{name} on {threads} threads"


_COUNT_THREADS = """
import os, torch
from hstu_dist.ops import native
from tests.ops import cases
p = cases.problem(cases.Case(name="threads", lengths=(3,) * 8))
before = len(os.listdir("/proc/self/task"))
for threads in (1, 3):
    torch.set_num_threads(threads)
    p.run(cases.Backend.NATIVE, torch.float32)
    print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_obeys_the_number_of_threads() -> None:
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", _COUNT_THREADS], cwd=root, capture_output=True, text=True, check=True
    )
    # the tensors are too small for PyTorch to start threads of its own
    assert result.stdout.split() == ["0", "2"]


def test_long_sequence_in_linear_memory() -> None:
    # a table of all pairs would take 17 GB
    n = 65_536
    q, k, v = (torch.randn(n, 1, 1, requires_grad=True) for _ in range(3))
    spec = AttentionSpec(normalizer=float(n), window=128, backend=Backend.NATIVE)
    times = torch.arange(n)
    bias = RelativeBias(
        position_weight=torch.zeros(2 * n - 1, requires_grad=True),
        time_weight=torch.zeros(129, requires_grad=True),
        query_times=times,
        key_times=times,
    )
    out = hstu_attention(q, k, v, JaggedLayout(torch.tensor([0, n])), spec, bias)
    out.sum().backward()
    tail = slice(n - 400, n)
    short = hstu_attention(
        q[tail], k[tail], v[tail], JaggedLayout(torch.tensor([0, 400])), replace(spec, backend=Backend.REFERENCE)
    )
    torch.testing.assert_close(out[-200:], short[-200:])


def test_missing_library_has_a_clear_reason(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="is missing: there was no working"):
        open_library(tmp_path / "libmissing.so")
    (tmp_path / "libbroken.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match="does not load"):
        open_library(tmp_path / "libbroken.so")


def test_without_library_blocked_serves_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(backends._MODULES, Backend.NATIVE, "hstu_dist.ops.not_built")
    backends._has_native.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            served = [backends.fastest(torch.device("cpu")) for _ in range(3)]
    finally:
        backends._has_native.cache_clear()
    assert served == [Backend.BLOCKED] * 3
    assert len(caplog.records) == 1 and "slower backend blocked" in caplog.text
