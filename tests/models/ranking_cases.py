"""Ranking towers and batches with actions, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from hstu_dist.actions import action_fields
from hstu_dist.batch import JaggedBatch
from hstu_dist.models.config import DLRMConfig, HSTUConfig, ModelConfig, TransformerConfig
from hstu_dist.models.dlrm import DLRMTower
from hstu_dist.models.ranking import RankingTower
from hstu_dist.models.ranking_shape import RankingShape
from hstu_dist.ops import backends
from tests.models.cases import batch_of

WIDTH = 12
MAX_EVENTS = 10

ENCODERS: dict[str, HSTUConfig | TransformerConfig] = {
    "hstu": HSTUConfig(width=WIDTH, num_heads=2, max_length=MAX_EVENTS),
    "production": HSTUConfig(
        width=WIDTH, num_heads=2, max_length=MAX_EVENTS, affine_norm=True, uvqk_bias=True, concat_ux=True, alpha=0.4
    ),
    "sasrec": TransformerConfig(width=WIDTH, num_heads=2, max_length=MAX_EVENTS, ffn_width=9),
}
MODELS: dict[str, ModelConfig] = {
    **ENCODERS,
    "dlrm": DLRMConfig(width=WIDTH, dense_width=7, over_widths=(16, 9)),
    "dlrm_cross": DLRMConfig(width=WIDTH, dense_width=7, over_widths=(16,), interaction="cross", cross_rank=5),
}

FIELDS = action_fields({"is_click": 1, "stars": 3, "play_time": 20})
SHAPE = RankingShape(
    num_items=50, actions=tuple(zip(FIELDS, (2, 8, 21), strict=True)), contextual=(50, 3), outputs=3, head_width=6
)


def words_of(count: int, seed: int) -> torch.Tensor:
    """[count] int32 action words."""
    return torch.randint(1 << 24, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def ranking_batch(lengths: Sequence[int], seed: int = 0) -> JaggedBatch:
    """A batch of `batch_of` with actions and contextual features."""
    batch = batch_of(lengths, seed=seed)
    codes = torch.randint(3, (len(lengths), 2), generator=torch.Generator().manual_seed(seed))
    return replace(batch, actions=words_of(batch.num_tokens, seed), contextual=codes)


def tower_of(config: ModelConfig, shape: RankingShape = SHAPE) -> RankingTower | DLRMTower:
    """A tower whose contextual embeddings are no zeros, so that they matter."""
    torch.manual_seed(1)
    cpu = torch.device("cpu")
    tower: RankingTower | DLRMTower
    if isinstance(config, DLRMConfig):
        tower = DLRMTower(config, shape, cpu, backends.row_kernels(backends.fastest(cpu)))
    else:
        tower = RankingTower(config, shape, cpu)
    for table in tower.features.contextual:
        assert isinstance(table, nn.Embedding)
        nn.init.normal_(table.weight, std=0.02)
    return tower
