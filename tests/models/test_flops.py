"""Closed forms against torch's counter on what is really computed, and against the parameters really built."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hstu_dist.losses.config import FullSoftmaxConfig, SampledSoftmaxConfig
from hstu_dist.models.config import HSTUConfig, TransformerConfig
from hstu_dist.models.flops import Workload, count_flops, count_parameters
from tests.models.cases import VARIANTS, batch_of, encode, tower_of

NUM_ITEMS = 50
LENGTH = 17
PADDED = [LENGTH] * 3

variants = pytest.mark.parametrize("variant", VARIANTS)


def eager_loss(queries_TD: Tensor, scores_per_token: int) -> Tensor:
    """Softmax loss by one product: of all items, or of candidates of each token's own."""
    T, D = queries_TD.shape
    if scores_per_token == NUM_ITEMS:
        scores = queries_TD @ torch.randn(NUM_ITEMS, D, requires_grad=True).T
    else:
        scores = torch.einsum("td,tcd->tc", queries_TD, torch.randn(T, scores_per_token, D, requires_grad=True))
    return -scores.log_softmax(dim=1)[:, 0].sum()


def counted(config: HSTUConfig | TransformerConfig, scores_per_token: int) -> tuple[int, int]:
    """FLOPs of forward and backward as torch counts them; the reference computes hidden pairs, too."""
    tower = tower_of(replace(config, backend="reference"))
    batch = batch_of(PADDED, NUM_ITEMS)
    items = torch.randn(batch.num_tokens, config.width, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        loss = eager_loss(encode(tower, items, batch), scores_per_token)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def full_work(config: HSTUConfig | TransformerConfig) -> Workload:
    """As the reference computes it, which masks afterwards; it does leave out what truncated layers skip."""
    work = Workload.full(PADDED)
    if isinstance(config, TransformerConfig) or not config.truncated_layers:
        return work
    kept = Workload.full([config.truncated_length] * len(PADDED))
    return replace(
        work,
        skipped_tokens=work.tokens - kept.tokens,
        skipped_pairs=work.attention_pairs - kept.attention_pairs,
    )


@pytest.mark.slow
@variants
@pytest.mark.parametrize("loss", [SampledSoftmaxConfig(num_negatives=6), FullSoftmaxConfig()])
def test_flops_are_those_that_torch_counts(variant: str, loss: SampledSoftmaxConfig | FullSoftmaxConfig) -> None:
    config = VARIANTS[variant]
    scores_per_token = loss.scores_per_token(NUM_ITEMS)
    assert scores_per_token == (7 if isinstance(loss, SampledSoftmaxConfig) else NUM_ITEMS)
    flops = count_flops(config, full_work(config), scores_per_token)
    assert counted(config, scores_per_token) == (flops.forward, flops.backward)
    assert flops.training == flops.forward + flops.backward


def test_the_parts_are_the_formulas() -> None:
    config = HSTUConfig(width=512, num_layers=3, num_heads=8, qk_width=32, value_width=64)
    flops = count_flops(config, Workload(tokens=1000, attention_pairs=70_000), scores_per_token=129)
    assert flops.projections == 2 * 1000 * 3 * (512 * (2 * 512 + 2 * 256) + 512 * 512)
    assert flops.attention == 2 * 70_000 * 3 * 8 * (32 + 64)
    assert flops.scores == 2 * 1000 * 129 * 512
    assert flops.forward == flops.projections + flops.attention + flops.scores


def test_work_counts_visible_pairs_of_jagged_sequences() -> None:
    lengths = [0, 1, 5, 3]
    visible = [(q, k) for n in lengths for q in range(n) for k in range(q + 1)]
    assert Workload.causal(lengths) == Workload(tokens=9, attention_pairs=len(visible))
    assert Workload.full(lengths) == Workload(tokens=9, attention_pairs=0 + 1 + 25 + 9)
    assert Workload.causal(lengths[:2]) + Workload.causal(lengths[2:]) == Workload.causal(lengths)
    assert Workload.causal([]) == Workload()


@pytest.mark.parametrize(
    "config",
    [
        *VARIANTS.values(),
        HSTUConfig(),
        HSTUConfig(width=24, num_heads=4, value_width=9, affine_norm=True, num_layers=3),
        HSTUConfig(width=10, qk_width=3, concat_ux=True, relative_bias="position"),
        TransformerConfig(width=16, num_heads=4, num_layers=5, ffn_width=64),
    ],
)
def test_parameters_are_those_of_the_tower(config: HSTUConfig | TransformerConfig) -> None:
    tower = tower_of(config)
    parameters = count_parameters(config, NUM_ITEMS)
    assert parameters.dense == sum(p.numel() for p in tower.parameters())
    encodings = [tower.position, *([] if tower.elapsed is None else [tower.elapsed])]
    assert parameters.positions == sum(table.weight.numel() for table in encodings)
    named = dict(tower.named_parameters())
    assert parameters.norms == sum(p.numel() for name, p in named.items() if "_norm." in name)
    # biases of dense layers are called `bias`, the tables of the relative bias `..._weight`
    assert parameters.relative_bias == sum(p.numel() for name, p in named.items() if name.endswith("_weight"))
    assert parameters.total == parameters.dense + NUM_ITEMS * config.width
