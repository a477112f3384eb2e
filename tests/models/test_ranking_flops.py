"""Closed forms of the ranking models against torch's counter and the parameters really built."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hstu_dist.models.config import DLRMConfig, HSTUConfig, ModelConfig, TransformerConfig
from hstu_dist.models.flops import Workload
from hstu_dist.models.ranking_flops import count_ranking_flops, count_ranking_parameters, ranking_work
from tests.models.ranking_cases import MODELS, SHAPE, WIDTH, ranking_batch, tower_of

LENGTHS = [10, 7, 10]
C = len(SHAPE.contextual)

models = pytest.mark.parametrize("model", MODELS)


def eager(config: ModelConfig) -> ModelConfig:
    return config if isinstance(config, DLRMConfig) else replace(config, backend="reference")


@models
def test_flops_are_those_that_torch_counts(model: str) -> None:
    config = MODELS[model]
    tower = tower_of(eager(config))
    batch = ranking_batch(LENGTHS)
    items = torch.randn(batch.num_tokens, WIDTH, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out = tower(items, batch, 1)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    work = ranking_work(config, LENGTHS, C)
    if isinstance(config, (HSTUConfig, TransformerConfig)):
        # the reference computes hidden pairs, too
        full = Workload.full([2 * n + C for n in LENGTHS])
        work = replace(work, attention_pairs=full.attention_pairs)
    flops = count_ranking_flops(config, SHAPE, work)
    assert forward.get_total_flops() == flops.forward
    # the dense numbers of DLRM need no gradient
    spared = 2 * sum(LENGTHS) * 2 * config.dense_width if isinstance(config, DLRMConfig) else 0
    assert backward.get_total_flops() == flops.backward - spared
    assert spared <= 0.01 * flops.training


def test_work_counts_visible_pairs() -> None:
    def seen(query: int, key: int) -> bool:
        return key < C if query < C else key <= query

    pairs = sum(seen(q, k) for n in LENGTHS for q in range(2 * n + C) for k in range(2 * n + C))
    expected = Workload(tokens=2 * 27 + 3 * C, attention_pairs=pairs, context=27 + 3 * C)
    assert ranking_work(MODELS["hstu"], LENGTHS, C) == expected
    assert ranking_work(MODELS["dlrm"], LENGTHS, C) == Workload(tokens=27)


@models
def test_parameters_are_those_of_the_tower(model: str) -> None:
    config = MODELS[model]
    tower = tower_of(config)
    parameters = count_ranking_parameters(config, SHAPE)
    assert parameters.dense == sum(p.numel() for p in tower.parameters())
    assert parameters.features == sum(p.numel() for p in tower.features.parameters())
    assert parameters.total == parameters.dense + 50 * WIDTH
