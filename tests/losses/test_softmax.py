"""Sampled and full softmax, value and gradients, against the formula written out and differentiated by autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hstu_dist.losses import softmax
from hstu_dist.losses.softmax import Candidates, softmax_loss
from hstu_dist.ops.jagged import IdSet
from hstu_dist.ops.random import TokenNoise, fold

TEMPERATURE = 0.05


def naive(queries: Tensor, candidates: Candidates, temperature: float) -> Tensor:
    """The formula, one position at a time."""
    lengths = candidates.table.norm(dim=1, keepdim=True).clamp(min=1e-6)
    items = candidates.table / lengths
    total = queries.sum() * 0.0
    for t, positive in enumerate(candidates.positive.tolist()):
        scores = items @ queries[t] / temperature
        if candidates.negative is None:
            total = total + scores.logsumexp(0) - scores[positive]
            continue
        negative = candidates.negative[t]
        masked = torch.where(negative == positive, torch.tensor(-5e4, dtype=scores.dtype), scores[negative])
        total = total + torch.cat([scores[positive, None], masked]).logsumexp(0) - scores[positive]
    return total


def problem(positions: int, rows: int, negatives: int | None, width: int = 6) -> tuple[Tensor, Candidates]:
    """Few rows, so that negatives repeat and equal the positive; one row of length zero, one beyond unit length."""
    g = torch.Generator().manual_seed(3)
    queries = torch.nn.functional.normalize(torch.randn(positions, width, generator=g, dtype=torch.float64), dim=1)
    table = 0.02 * torch.randn(rows, width, generator=g, dtype=torch.float64)
    if rows > 1:
        table[0], table[1] = 0.0, 5.0
    positive = torch.randint(rows, (positions,), generator=g) if rows else torch.zeros(0, dtype=torch.int64)
    negative = None
    if negatives is not None:
        negative = torch.randint(max(rows, 1), (positions, negatives), generator=g)
        if positions > 1:
            # nothing but the positive: the loss of this position is exactly zero
            negative[1] = positive[1]
    return queries, Candidates(table, positive, negative)


def gradients(loss: Tensor, queries: Tensor, table: Tensor) -> dict[str, Tensor]:
    d_queries, d_table = torch.autograd.grad(3.0 * loss, [queries, table])
    return {"loss": loss.detach(), "queries": d_queries, "table": d_table}


def run(function, queries: Tensor, candidates: Candidates, dtype: torch.dtype) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    q, table = (x.to(dtype).requires_grad_() for x in (queries.clone(), candidates.table.clone()))
    return gradients(function(q, replace(candidates, table=table), TEMPERATURE), q, table)


@pytest.mark.parametrize("negatives", [None, 1, 7], ids=["full", "one", "seven"])
@pytest.mark.parametrize("chunk", [1, 2, 5, 6, 1000])
def test_equals_the_formula(negatives: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, candidates = problem(positions=11, rows=9, negatives=negatives)
    # rows of scores in a chunk: 11 = 5 + 5 + 1 leaves a short one, and 1000 takes all at once
    monkeypatch.setattr(softmax, "_CHUNK_ELEMENTS", chunk * 9)
    expected = run(naive, queries, candidates, torch.float64)
    got = run(softmax_loss, queries, candidates, torch.float64)
    for name, value in expected.items():
        # float64 sums in another order; the zero row's gradient is finite but large, 1e6 times the others
        assert torch.allclose(got[name], value, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("negatives", [None, 32], ids=["full", "sampled"])
def test_float32_is_as_exact_as_plain_float32(negatives: int | None) -> None:
    queries, candidates = problem(positions=40, rows=25, negatives=negatives, width=50)
    exact = run(naive, queries, candidates, torch.float64)
    eager = run(naive, queries, candidates, torch.float32)
    fused = run(softmax_loss, queries, candidates, torch.float32)
    for name, truth in exact.items():
        assert fused[name].dtype == torch.float32
        allowed = 2 * (eager[name] - truth).abs().max() + 2 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (fused[name] - truth).abs().max() <= allowed, name


def test_a_negative_equal_to_the_positive_does_not_count() -> None:
    queries, candidates = problem(positions=5, rows=9, negatives=4)
    assert candidates.negative is not None
    candidates.negative[:] = candidates.positive[:, None]
    got = run(softmax_loss, queries, candidates, torch.float64)
    assert float(got["loss"]) == 0.0 and not got["queries"].any() and not got["table"].any()
    candidates.negative[2, 3] = (candidates.positive[2] + 1) % 9
    got = run(softmax_loss, queries, candidates, torch.float64)
    assert float(got["loss"]) > 0.0
    assert got["queries"].any(dim=1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("negatives", [None, 3], ids=["full", "sampled"])
@pytest.mark.parametrize("rows", [0, 4])
def test_no_position_costs_nothing_and_keeps_gradients_defined(negatives: int | None, rows: int) -> None:
    queries, candidates = problem(positions=0, rows=rows, negatives=negatives)
    got = run(softmax_loss, queries, candidates, torch.float32)
    assert float(got["loss"]) == 0.0
    assert got["queries"].shape == (0, 6) and got["table"].shape == (rows, 6) and not got["table"].any()


def test_ids_beyond_32_bits_keep_their_identity() -> None:
    """Ids that float32 or int32 would merge: a step's compact table gives the loss of the whole one."""
    high = 1 << 40
    noise = TokenNoise(fold(1), torch.arange(6))
    positive = torch.tensor([high - 1, high - 2, (1 << 31) + 1, 1 << 31, 1 << 24, (1 << 24) + 1])
    negative = noise.integers(5, high)
    assert int(negative.max()) > 1 << 32
    needed = IdSet([positive, negative], high)
    # a row is a function of its id, so that a wrong id gives a wrong row
    table = TokenNoise(fold(2), needed.ids).truncated_normal(8).double()
    queries = torch.nn.functional.normalize(torch.randn(6, 8, dtype=torch.float64), dim=1)
    loss = softmax_loss(queries, Candidates(table, needed.places(positive), needed.places(negative)), TEMPERATURE)

    drawn = torch.cat([positive[:, None], negative], dim=1)
    items = TokenNoise(fold(2), drawn.flatten()).truncated_normal(8).double().view(6, 6, 8)
    scores = torch.einsum("td,trd->tr", queries, items / items.norm(dim=2, keepdim=True)) / TEMPERATURE
    assert torch.allclose(loss, -scores.log_softmax(1)[:, 0].sum(), rtol=1e-12)
