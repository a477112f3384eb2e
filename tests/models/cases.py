"""Random batches, and a tower run over one, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_dist.batch import JaggedBatch
from hstu_dist.models.config import HSTUConfig, TransformerConfig
from hstu_dist.models.context import sequence_context
from hstu_dist.models.tower import Tower

MAX_LENGTH = 20

VARIANTS: dict[str, HSTUConfig | TransformerConfig] = {
    "paper": HSTUConfig(width=12, num_heads=2, max_length=MAX_LENGTH),
    "production": HSTUConfig(
        width=12, num_heads=2, max_length=MAX_LENGTH, affine_norm=True, uvqk_bias=True, concat_ux=True, alpha=0.4
    ),
    "widths": HSTUConfig(width=12, num_heads=3, qk_width=5, value_width=7, max_length=MAX_LENGTH),
    "softmax": HSTUConfig(width=12, num_heads=2, max_length=MAX_LENGTH, activation="softmax"),
    "position": HSTUConfig(width=12, num_heads=2, max_length=MAX_LENGTH, relative_bias="position"),
    "no-bias": HSTUConfig(width=12, num_heads=2, max_length=MAX_LENGTH, relative_bias="none"),
    "timed": HSTUConfig(width=12, num_heads=2, max_length=MAX_LENGTH, input_time=True),
    "semi-local": HSTUConfig(width=12, num_heads=2, max_length=MAX_LENGTH, window=4, global_prefix=2),
    "truncated": HSTUConfig(width=12, num_heads=2, max_length=MAX_LENGTH, truncated_layers=1, truncated_length=7),
    "sasrec": TransformerConfig(width=12, num_heads=2, max_length=MAX_LENGTH, ffn_width=9),
}


def batch_of(lengths: Sequence[int], num_items: int = 50, seed: int = 0) -> JaggedBatch:
    """Random items; times ascend by seconds to months and repeat; the last query time is the last event's."""
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    steps = torch.randint(0, 2, (total + 1,), generator=g) * 10 ** torch.randint(0, 8, (total + 1,), generator=g)
    times = steps.cumsum(0) + 10**9
    return JaggedBatch(
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        item_ids=torch.randint(num_items, (total,), generator=g),
        timestamps=times[:-1].clone(),
        actions=torch.zeros(total, dtype=torch.int32),
        target_ids=torch.randint(num_items, (total,), generator=g),
        query_times=times[1:].clone(),
        row_ids=torch.arange(100, 100 + len(lengths)),
    )


def tower_of(config: HSTUConfig | TransformerConfig) -> Tower:
    torch.manual_seed(1)
    return Tower(config, torch.device("cpu"))


def encode(tower: Tower, items_TD: Tensor, batch: JaggedBatch, noise_key: int | None = None) -> Tensor:
    out: Tensor = tower(items_TD, sequence_context(batch, MAX_LENGTH, noise_key))
    return out
