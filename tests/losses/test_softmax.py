"""The objectives of the configuration: cosine similarities, ids beyond 32 bits, logQ correction, the chosen backend."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from hstu_dist.losses.config import FullSoftmaxConfig, SampledSoftmaxConfig
from hstu_dist.losses.softmax import Candidates, softmax_loss, softmax_spec
from hstu_dist.ops import backends
from hstu_dist.ops.jagged import IdSet
from hstu_dist.ops.random import TokenNoise, fold
from hstu_dist.ops.softmax_spec import SoftmaxBackend, SoftmaxSpec

CPU = torch.device("cpu")
SAMPLED = SampledSoftmaxConfig()


def test_items_are_compared_by_cosine() -> None:
    queries = normalize(torch.randn(11, 6, dtype=torch.float64), dim=1)
    table = torch.randn(9, 6, dtype=torch.float64)
    # a row of length zero, and one far beyond unit length
    table[0], table[1] = 0.0, 5.0
    positive, negative = torch.randint(9, (11,)), torch.randint(9, (11, 4))
    spec = SoftmaxSpec(temperature=0.05)
    loss = softmax_loss(queries, Candidates(table, positive, negative), spec)
    scores = queries @ (table / table.norm(dim=1, keepdim=True).clamp(min=1e-6)).T / 0.05
    sampled = scores.gather(1, negative).masked_fill(negative == positive[:, None], -5e4)
    found = scores.gather(1, positive[:, None])
    want = torch.cat([found, sampled], 1).logsumexp(1).sum() - found.sum()
    assert torch.allclose(loss, want, rtol=1e-12)


def test_ids_beyond_32_bits_keep_their_identity() -> None:
    """Ids that float32 or int32 would merge: a step's compact table gives the loss of the whole one."""
    high = 1 << 40
    noise = TokenNoise(fold(1), torch.arange(6))
    positive = torch.tensor([high - 1, high - 2, (1 << 31) + 1, 1 << 31, 1 << 24, (1 << 24) + 1])
    negative = noise.integers(5, high)
    assert int(negative.max()) > 1 << 32
    needed = IdSet.of([positive, negative], high)
    # a row is a function of its id, so that a wrong id gives a wrong row
    table = TokenNoise(fold(2), needed.ids).truncated_normal(8).double()
    queries = normalize(torch.randn(6, 8, dtype=torch.float64), dim=1)
    candidates = Candidates(table, needed.places(positive), needed.places(negative))
    loss = softmax_loss(queries, candidates, softmax_spec(SAMPLED, high, CPU))

    drawn = torch.cat([positive[:, None], negative], dim=1)
    items = TokenNoise(fold(2), drawn.flatten()).truncated_normal(8).double().view(6, 6, 8)
    scores = torch.einsum("td,trd->tr", queries, items / items.norm(dim=2, keepdim=True)) / SAMPLED.temperature
    assert torch.allclose(loss, -scores.log_softmax(1)[:, 0].sum(), rtol=1e-12)


def test_corrected_loss_estimates_that_of_the_full_softmax() -> None:
    items, draws = 50, 20_000
    queries = normalize(torch.randn(6, 8, dtype=torch.float64), dim=1)
    table, positive = torch.randn(items, 8, dtype=torch.float64), torch.randint(items, (6,))
    negative = torch.randint(items, (6, draws))

    def loss(config: SampledSoftmaxConfig | FullSoftmaxConfig, negative: torch.Tensor | None) -> float:
        spec = softmax_spec(config, items, CPU)
        return float(softmax_loss(queries, Candidates(table, positive, negative), spec))

    full = loss(FullSoftmaxConfig(temperature=0.5), None)
    sampled = SampledSoftmaxConfig(num_negatives=draws, temperature=0.5)
    corrected = SampledSoftmaxConfig(num_negatives=draws, temperature=0.5, log_q_correction=True)
    # 20,000 draws of scores that spread over e^4 leave less than 1% of sampling error
    assert loss(corrected, negative) == pytest.approx(full, rel=0.01)
    # uncorrected, each position counts every negative 400 times
    assert loss(sampled, negative) > full + 6 * 4


def test_the_fastest_backend_is_chosen_once() -> None:
    spec = softmax_spec(SampledSoftmaxConfig(num_negatives=128, temperature=0.1), 1000, CPU)
    assert spec == SoftmaxSpec(temperature=0.1, backend=backends.fastest_softmax(CPU))
    assert softmax_spec(FullSoftmaxConfig(), 1000, torch.device("cuda")).backend is SoftmaxBackend.CHUNKED
