"""Training compute of a retrieval run, in closed form, from the lengths that its passes have."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from hstu_dist.data.config import LoaderConfig
from hstu_dist.data.epoch import EpochPlanner
from hstu_dist.data.split import Rows
from hstu_dist.losses.config import RetrievalLossConfig
from hstu_dist.models.config import EncoderConfig
from hstu_dist.models.flops import Workload, count_flops, encoder_work

Ints = npt.NDArray[np.int64]


def training_flops(model: EncoderConfig, loss: RetrievalLossConfig, num_items: int, passes: Iterable[Ints]) -> int:
    """FLOPs of forward and backward over all passes.

    Args:
        model: the encoder.
        loss: decides how many items a position is scored against.
        num_items: of the data set.
        passes: lengths of the sequences of each pass over the data.
    """
    work = sum((_work(model, lengths) for lengths in passes), Workload())
    return count_flops(model, work, loss.scores_per_token(num_items)).training


def pass_lengths(rows: Rows, config: LoaderConfig, epochs: int) -> Iterable[Ints]:
    """Lengths of the sequences that each pass really has, Stochastic Length and emission included.

    Args:
        rows: of the training split.
        config: of the training loader.
        epochs: passes.
    """
    planner = EpochPlanner(rows, config)
    for epoch in range(epochs):
        layout = planner.layout(epoch)
        yield layout.lengths[layout.order]


def _work(model: EncoderConfig, lengths: Ints) -> Workload:
    """By distinct lengths: a data set has millions of sequences, but few lengths."""
    total = Workload()
    for length, count in zip(*np.unique(lengths, return_counts=True), strict=True):
        one = encoder_work(model, [int(length)])
        total += Workload(**{name: value * int(count) for name, value in vars(one).items()})
    return total
