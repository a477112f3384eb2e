"""Training compute of a retrieval run, in closed form, from the lengths that its passes have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from hstu_dist.data.config import LoaderConfig
from hstu_dist.data.epoch import EpochPlanner
from hstu_dist.data.split import Rows
from hstu_dist.losses.config import RetrievalLossConfig
from hstu_dist.models.config import EncoderConfig
from hstu_dist.models.flops import Workload, count_flops, encoder_work


def training_flops(model: EncoderConfig, loss: RetrievalLossConfig, num_items: int, lengths: Mapping[int, int]) -> int:
    """FLOPs of forward and backward over all passes.

    Args:
        model: the encoder.
        loss: decides how many items a position is scored against.
        num_items: of the data set.
        lengths: inputs of a sequence → how often such a sequence is trained on.
    """
    total = Workload()
    for length, count in lengths.items():
        one = encoder_work(model, [length])
        total += Workload(**{name: value * count for name, value in vars(one).items()})
    return count_flops(model, total, loss.scores_per_token(num_items)).training


def trained_lengths(rows: Rows, config: LoaderConfig, epochs: int) -> Counter[int]:
    """Lengths that sequences really have over all passes, Stochastic Length and emission included.

    Args:
        rows: of the training split.
        config: of the training loader.
        epochs: passes.

    Returns:
        Inputs of a sequence → how often.
    """
    planner, found = EpochPlanner(rows, config), Counter[int]()
    alike = config.stochastic_length is None and config.emission is None
    for epoch in range(1 if alike else epochs):
        layout = planner.layout(epoch)
        lengths, counts = np.unique(layout.lengths[layout.order], return_counts=True)
        # a data set has millions of sequences, but few lengths
        found.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
    return Counter({length: count * epochs for length, count in found.items()}) if alike else found
