"""Every backend of the softmax losses against the reference in float64: loss and all gradients, at odd sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hstu_dist.ops import backends, softmax_chunked
from hstu_dist.ops.softmax_loss import softmax_loss
from hstu_dist.ops.softmax_spec import LossAndGradients, SoftmaxBackend, SoftmaxSpec

FACTOR = 1.7
"""Gradient of what the loss is part of."""

SPEC = SoftmaxSpec(temperature=0.07)
HAS_NATIVE = backends.fastest_softmax(torch.device("cpu")) is SoftmaxBackend.NATIVE
ROWS, PRODUCTS = 0, 1 << 30
"""Ratios that make chunks gather the rows of negatives always or never."""


@pytest.fixture(params=["rows", "products", *(["native"] if HAS_NATIVE else [])])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SoftmaxBackend:
    """Every fast backend, the chunked one in both of its ways."""
    if request.param == "native":
        return SoftmaxBackend.NATIVE
    monkeypatch.setattr(softmax_chunked, "_ROWS_ABOVE", ROWS if request.param == "rows" else PRODUCTS)
    return SoftmaxBackend.CHUNKED


@dataclass(frozen=True)
class Problem:
    """Tensors of a call in float64, or in another dtype by `run`."""

    queries: Tensor
    items: Tensor
    positive: Tensor
    negative: Tensor | None
    spec: SoftmaxSpec

    def run(self, backend: SoftmaxBackend, dtype: torch.dtype) -> LossAndGradients:
        queries, items = (x.to(dtype, copy=True).requires_grad_() for x in (self.queries, self.items))
        loss = softmax_loss(queries, items, self.positive, self.negative, replace(self.spec, backend=backend))
        return LossAndGradients(loss.detach(), *torch.autograd.grad(FACTOR * loss, [queries, items]))


def problem(positions: int, candidates: int, negatives: int | None, width: int, spec: SoftmaxSpec = SPEC) -> Problem:
    """Few candidates, so that negatives repeat and equal the positive; one position has no other negative at all."""
    queries = normalize(torch.randn(positions, width, dtype=torch.float64), dim=1)
    items = normalize(torch.randn(candidates, width, dtype=torch.float64), dim=1)
    # beyond the unit vectors of training
    items[:1] *= 3.0
    positive = torch.randint(max(candidates, 1), (positions,))
    negative = None if negatives is None else torch.randint(max(candidates, 1), (positions, negatives))
    if negative is not None and positions > 1:
        negative[1] = positive[1]
    return Problem(queries, items, positive, negative, spec)


# an orthogonal choice: every size meets every other kind of size somewhere, in float32 as in float64
_SIZES = itertools.product([1, 63, 64, 65, 200], [1, 2, 65, 300], [None, 1, 7, 128], [1, 50, 52, 129])
CASES = [case for i, case in enumerate(_SIZES) if (i * 7 + i // 16) % 9 == 0]
# PyTorch has another, more exact routine for the product of a matrix with one wide row
CASES.remove((1, 300, None, 129))
CASES += [(0, 1, None, 50), (0, 4, 3, 50), (0, 0, 3, 5), (0, 0, None, 5), (2100, 9, 7, 3), (1300, 70, None, 3)]


def assert_as_exact_as_eager(p: Problem, got: LossAndGradients, dtype: torch.dtype) -> None:
    """The error against float64 is at most twice that of the reference in the same dtype."""
    exact = p.run(SoftmaxBackend.REFERENCE, torch.float64)
    eager = p.run(SoftmaxBackend.REFERENCE, dtype)
    for name, truth, want, value in zip(exact._fields, exact, eager, got, strict=True):
        assert value.dtype == dtype and value.shape == truth.shape, name
        if truth.numel() == 0:
            continue
        size = truth.abs().max()
        rounding = 2 * torch.finfo(dtype).eps * size
        if dtype == torch.float64:
            # eager is the truth itself; scores are of size 1 / tau, and gradients add up terms of that size
            rounding = 1e-13 / p.spec.temperature * max(float(size), 1 / p.spec.temperature)
        allowed = 2 * (want.double() - truth).abs().max() + rounding
        error = (value.double() - truth).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, size {size:.2e}"


@pytest.fixture(params=[1, 100, 1 << 21], ids=lambda n: f"chunk-{n}")
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one position, of a few with a short one last, and of all."""
    monkeypatch.setattr(softmax_chunked, "_CHUNK_ELEMENTS", request.param)


@pytest.mark.parametrize("ratio", [ROWS, PRODUCTS])
@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("case", CASES[::6], ids=str)
def test_chunks_equal_the_whole(
    case: tuple[int, int, int | None, int], ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax_chunked, "_ROWS_ABOVE", ratio)
    p = problem(*case)
    assert_as_exact_as_eager(p, p.run(SoftmaxBackend.CHUNKED, torch.float64), torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_backend_is_as_exact_as_eager(
    backend: SoftmaxBackend, case: tuple[int, int, int | None, int], dtype: torch.dtype
) -> None:
    p = problem(*case)
    assert_as_exact_as_eager(p, p.run(backend, dtype), dtype)


def test_half_precision(backend: SoftmaxBackend) -> None:
    p = problem(64, 65, 7, 50)
    assert_as_exact_as_eager(p, p.run(backend, torch.bfloat16), torch.bfloat16)


def test_own_rows_are_gathered_where_candidates_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(63, 65 * 7, 7, 50)
    monkeypatch.delattr(softmax_chunked, "_by_products")
    assert_as_exact_as_eager(p, p.run(SoftmaxBackend.CHUNKED, torch.float32), torch.float32)
    with pytest.raises(NameError):
        problem(63, 64 * 7, 7, 50).run(SoftmaxBackend.CHUNKED, torch.float32)


@pytest.mark.parametrize("negatives", [None, 5])
def test_the_reference_differentiates_itself(negatives: int | None) -> None:
    p = problem(4, 6, negatives, 3, SoftmaxSpec(temperature=0.5, backend=SoftmaxBackend.REFERENCE))
    loss: Callable[[Tensor, Tensor], Tensor] = lambda q, e: softmax_loss(q, e, p.positive, p.negative, p.spec)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (p.queries.requires_grad_(), p.items.requires_grad_()))


def test_the_reference_is_the_formula() -> None:
    p = problem(5, 9, 4, 6, SoftmaxSpec(temperature=0.5, log_expected_count=-0.8))
    total = 0.0
    assert p.negative is not None
    for query, positive, negative in zip(p.queries, p.positive.tolist(), p.negative.tolist(), strict=True):
        scores = (p.items @ query / 0.5).tolist()
        # a draw that is the positive has no part in it
        others = [scores[n] + 0.8 for n in negative if n != positive]
        terms = torch.tensor([scores[positive], *others], dtype=torch.float64)
        total += float(terms.logsumexp(0)) - scores[positive]
    assert float(p.run(SoftmaxBackend.REFERENCE, torch.float64).loss) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("correction", [-3.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_correction_of_negatives(backend: SoftmaxBackend, dtype: torch.dtype, correction: float) -> None:
    p = problem(65, 30, 20, 50, SoftmaxSpec(temperature=0.2, log_expected_count=correction))
    assert_as_exact_as_eager(p, p.run(backend, dtype), dtype)


@pytest.mark.parametrize("negatives", [None, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_beyond_the_mask(backend: SoftmaxBackend, dtype: torch.dtype, negatives: int | None) -> None:
    # scores far below -5e4: what is masked wins, and passes no gradient on
    p = problem(65, 30, negatives, 9, SoftmaxSpec(temperature=1e-5))
    assert_as_exact_as_eager(p, p.run(backend, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_negative_equal_to_the_positive_does_not_count(backend: SoftmaxBackend, dtype: torch.dtype) -> None:
    p = problem(5, 9, 4, 6)
    assert p.negative is not None
    p.negative[:] = p.positive[:, None]
    got = p.run(backend, dtype)
    assert float(got.loss) == 0.0 and not got.queries.any() and not got.items.any()
    p.negative[2, 3] = (p.positive[2] + 1) % 9
    got = p.run(backend, dtype)
    assert float(got.loss) > 0.0
    assert got.queries.any(dim=1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("negatives", [None, 7])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_query_that_is_no_number_shows_in_the_loss(
    backend: SoftmaxBackend, value: float, negatives: int | None
) -> None:
    p = problem(70, 65, negatives, 50)
    p.queries[37, 4] = value
    assert p.run(backend, torch.float32).loss.isnan()


BAD = {
    "queries, items: got shapes": {"items": torch.zeros(9, 7)},
    "items: got torch.float64": {"items": torch.zeros(9, 6, dtype=torch.float64)},
    "positive: got shape": {"positive": torch.zeros(4, dtype=torch.int64)},
    "positive: got places 9 to 9": {"positive": torch.full((5,), 9)},
    "negative: got shape .* torch.int32": {"negative": torch.zeros(5, 4, dtype=torch.int32)},
    "negative: got places -1 to 0": {
        "negative": torch.zeros(5, 4, dtype=torch.int64).index_fill_(0, torch.tensor(2), -1)
    },
    r"queries: got strides \(1, 5\)": {"queries": torch.zeros(6, 5).T},
    "positive: got places 0 to 0, expected rows of items, .0, 0.": {"items": torch.zeros(0, 6)},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("backend", SoftmaxBackend)
def test_bad_input_is_refused(backend: SoftmaxBackend, message: str) -> None:
    good = {
        "queries": torch.zeros(5, 6),
        "items": torch.zeros(9, 6),
        "positive": torch.zeros(5, dtype=torch.int64),
        "negative": torch.zeros(5, 4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        softmax_loss(*{**good, **BAD[message]}.values(), replace(SPEC, backend=backend))


def test_a_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"SoftmaxSpec.temperature: got 0.0"):
        SoftmaxSpec(temperature=0.0)
