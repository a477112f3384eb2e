"""The native softmax losses beyond parity: every instruction set, borders of chunks, repeatable bits, large tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from hstu_dist.ops.native_abi import Isa, supported
from hstu_dist.ops.softmax_spec import LossAndGradients, SoftmaxSpec
from tests.ops.test_softmax_loss import FACTOR, Problem, assert_as_exact_as_eager, problem

native = pytest.importorskip("hstu_dist.ops.native_softmax", exc_type=ImportError)

ISAS = supported(native.LIBRARY)
CORRECTED = SoftmaxSpec(temperature=0.31, log_expected_count=-1.5)


def run_isa(p: Problem, dtype: torch.dtype, isa: Isa) -> LossAndGradients:
    """As Problem.run, on one instruction set."""
    queries, items = p.queries.to(dtype), p.items.to(dtype)
    got = native.loss_and_gradients(queries, items, p.positive, p.negative, p.spec, isa)
    return LossAndGradients(got.loss, FACTOR * got.queries, FACTOR * got.items)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# sampled: chunks of 32 blocks of min(128, 8192 / (R + 1)) positions; full: chunks of 2^21 scores, in blocks of 64
# positions, at least one; 64 groups of tiles of 64 candidates
BORDERS = [
    (1, 65, 7, 129),
    (64, 2, 1, 1),
    (65, 1, 128, 52),
    (2018, 300, 128, 3),
    (600, 300, 900, 5),
    (1, 64, None, 129),
    (65, 65, None, 52),
    (700, 3000, None, 5),
    (70, 4200, None, 17),
    (65, 33_000, None, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", BORDERS, ids=str)
@pytest.mark.parametrize("isa", ISAS, ids=lambda i: i.name)
def test_every_instruction_set_is_as_exact_as_eager(
    isa: Isa, case: tuple[int, int, int | None, int], dtype: torch.dtype
) -> None:
    p = problem(*case, CORRECTED)
    assert_as_exact_as_eager(p, run_isa(p, dtype, isa), dtype)


def test_random_sizes_match_the_reference() -> None:
    for i in range(60):
        positions, candidates, negatives, width = (int(torch.randint(1, n, ())) for n in (200, 300, 200, 80))
        p = problem(positions, candidates, None if i % 2 else negatives, width, CORRECTED)
        assert_as_exact_as_eager(p, run_isa(p, torch.float64, ISAS[i % len(ISAS)]), torch.float64)


@pytest.mark.parametrize("negatives", [None, 128])
@pytest.mark.usefixtures("threads")
def test_the_bits_do_not_depend_on_the_run_or_the_threads(negatives: int | None) -> None:
    p = problem(2500, 700, negatives, 50)
    first = run_isa(p, torch.float32, Isa.AUTO)
    for count in (1, 2, 3, 3, 8):
        torch.set_num_threads(count)
        for name, want, got in zip(first._fields, first, run_isa(p, torch.float32, Isa.AUTO), strict=True):
            assert torch.equal(got, want), f"{name} on {count} threads"


def test_a_table_of_which_few_rows_are_drawn() -> None:
    # more ranges than fit the first-level cache
    p = problem(50, 300, 20, 6)
    spread = torch.randint(600_000, (300,)).unique()
    rows = spread[torch.arange(300) % spread.numel()]
    table = torch.zeros(600_000, 6, dtype=torch.float64)
    table[spread] = p.items[: spread.numel()]
    assert p.negative is not None
    small = replace(p, items=table[spread], positive=p.positive % spread.numel(), negative=p.negative % spread.numel())
    want = run_isa(small, torch.float64, Isa.AUTO)
    assert small.negative is not None
    large = replace(small, items=table, positive=rows[small.positive], negative=rows[small.negative])
    got = run_isa(large, torch.float64, Isa.AUTO)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.queries, want.queries)
    assert torch.equal(got.items[spread], want.items)
    assert int(got.items.any(dim=1).sum()) <= spread.numel()
