"""The ranking baseline: DLRM, or its cross-network variant, of torchrec.models over pooled histories.

It reads what generative ranking reads: the candidate item, the contextual features, the user's earlier items and
actions, and the times. Where the encoder attends to earlier events, this model sees sums of them.

Shapes: E events, F sparse features, C contextual features, D width, K heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, InteractionArch, OverArch
from torchrec.modules.crossnet import LowRankCrossNet

from hstu_dist.batch import JaggedBatch
from hstu_dist.models.config import DLRMConfig
from hstu_dist.models.context import token_noise
from hstu_dist.models.ranking import Features, contextual_codes
from hstu_dist.models.ranking_shape import DENSE, POOLED, RankingShape
from hstu_dist.ops.jagged import positions, sequence_of
from hstu_dist.ops.random import fold
from hstu_dist.ops.row_kernels import RowKernels
from hstu_dist.ops.rows import drop_of, dropout

_LONGEST = 1 << 20
"""Events of a sequence that random numbers tell apart."""


class DLRMTower(nn.Module):
    """Predictions of what a user does with each event's item, from pooled features."""

    def __init__(self, config: DLRMConfig, shape: RankingShape, device: torch.device, rows: RowKernels) -> None:
        super().__init__()
        D = config.width
        self.num_contextual = len(shape.contextual)
        self.dropout, self.rows = config.dropout, rows
        self.features = Features(shape, D)
        self.dense = DenseArch(DENSE, [config.dense_width, D])
        sparse = 1 + POOLED + self.num_contextual
        self.interaction: nn.Module
        if config.interaction == "dot":
            self.interaction = InteractionArch(sparse)
            inputs = D + (sparse + 1) * sparse // 2
        else:
            inputs = (sparse + 1) * D
            self.interaction = _Cross(inputs, config)
        self.over = OverArch(inputs, [*config.over_widths, shape.outputs])
        self.to(device)

    def forward(self, items_ED: Tensor, batch: JaggedBatch, noise_key: int | None) -> Tensor:
        """Predictions [E, K] of every event; arguments are those of `RankingTower`."""
        # features are multiplied: at their initial deviation of 0.02 the products would vanish
        scale = items_ED.shape[1] ** 0.5
        items_ED, actions_ED = items_ED * scale, self.features.actions(batch.actions) * scale
        history = torch.stack([items_ED, actions_ED, items_ED * actions_ED], dim=1)
        contextual = self.features.context(contextual_codes(batch, self.num_contextual)) * scale
        owner, earlier = sequence_of(batch.offsets), positions(batch.offsets)
        pooled = means_before(history, batch.offsets)
        sparse_EFD = torch.cat([items_ED[:, None], pooled, contextual.index_select(0, owner)], dim=1)
        if noise_key is not None:
            noise = token_noise(batch, _LONGEST, fold(noise_key, 1))
            sparse_EFD = dropout(sparse_EFD.flatten(1), drop_of(noise, self.dropout), self.rows).view(sparse_EFD.shape)
        elapsed = batch.timestamps.diff(prepend=batch.timestamps[:1]).where(earlier > 0, 0)
        dense = torch.stack([earlier, elapsed], dim=1).to(items_ED.dtype).log1p()
        predicted: Tensor = self.over(self.interaction(self.dense(dense), sparse_EFD))
        return predicted.to(torch.promote_types(predicted.dtype, torch.float32))


class _Cross(nn.Module):
    """DCN V2's cross network over all features laid side by side; torchrec's wrapper of it refuses empty batches."""

    def __init__(self, inputs: int, config: DLRMConfig) -> None:
        super().__init__()
        self.net = LowRankCrossNet(inputs, num_layers=config.cross_layers, low_rank=config.cross_rank)

    def forward(self, dense_ED: Tensor, sparse_EFD: Tensor) -> Tensor:
        """[E, D] and [E, F, D] → [E, (F + 1) D]."""
        crossed: Tensor = self.net(torch.cat([dense_ED[:, None], sparse_EFD], dim=1).flatten(1))
        return crossed


def means_before(x_ExD: Tensor, offsets: Tensor) -> Tensor:
    """Mean over the rows of its sequence that come before each row; 0 for the first.

    Args:
        x_ExD: [E, ...] floating.
        offsets: [B+1] int64.

    Returns:
        [E, ...], dtype of x.
    """
    # in float64, so that what earlier sequences added to the running sum does not show in later ones
    sums = torch.cat([x_ExD.new_zeros(1, *x_ExD.shape[1:], dtype=torch.float64), x_ExD.to(torch.float64).cumsum(0)])
    starts = offsets[:-1].repeat_interleave(offsets.diff(), output_size=x_ExD.shape[0])
    earlier = torch.arange(x_ExD.shape[0], device=x_ExD.device) - starts
    count = earlier.clamp(min=1).view(-1, *[1] * (x_ExD.dim() - 1))
    means: Tensor = ((sums[:-1] - sums.index_select(0, starts)) / count).to(x_ExD.dtype)
    return means
