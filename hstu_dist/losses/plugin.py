"""A retrieval loss of the user's own, given the scores of positives and negatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hstu_dist.losses.config import PluginLossConfig
from hstu_dist.losses.softmax import Candidates
from hstu_dist.ops.normalize import unit_rows
from hstu_dist.ops.softmax_spec import MASKED
from hstu_dist.plugins import find

_ELEMENTS_AT_ONCE = 1 << 24


class ScoreLoss(Protocol):
    """What the target of `loss=plugin` is; `loss.settings` come as keywords."""

    def __call__(self, positive_T: Tensor, negative_TR: Tensor, **settings: object) -> Tensor:
        """Loss [T] of each position.

        Args:
            positive_T: [T] cosine similarity to the positive over the temperature.
            negative_TR: [T, R] those to the negatives; a negative that is the positive has a score of -50,000.
            settings: of the configuration.
        """


def score_loss(config: PluginLossConfig) -> Callable[[Tensor, Candidates], Tensor]:
    """The configured loss as a function of unit queries [T, D] and their candidates; it gives the sum over positions.

    Raises:
        UserError: the loss cannot be imported.
    """
    function: ScoreLoss = find(config.target)

    def part(queries_TD: Tensor, items_CD: Tensor, positive_T: Tensor, negative_TR: Tensor) -> Tensor:
        positives = (queries_TD * items_CD[positive_T]).sum(1) / config.temperature
        negatives = torch.einsum("td,trd->tr", queries_TD, items_CD[negative_TR]) / config.temperature
        negatives = negatives.masked_fill(negative_TR == positive_T[:, None], MASKED)
        return function(positives, negatives, **config.settings).sum()

    def loss(queries_TD: Tensor, candidates: Candidates) -> Tensor:
        assert candidates.negative is not None
        items_CD = unit_rows(candidates.table)
        rows = max(1, _ELEMENTS_AT_ONCE // (config.num_negatives * items_CD.shape[1]))
        # also without a position both have a gradient
        total = 0 * (queries_TD.sum() + items_CD.sum())
        for first in range(0, len(queries_TD), rows):
            here = slice(first, first + rows)
            # rows of negatives are gathered anew in the backward: all of them at once would not fit
            inputs = queries_TD[here], items_CD, candidates.positive[here], candidates.negative[here]
            total = total + checkpoint(part, *inputs, use_reentrant=False)
        return total

    return loss
