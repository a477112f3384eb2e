"""The ranking model on one rank."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.parallel import DenseSettings
from hstu_dist.distributed.shared_model import SharedModel
from hstu_dist.distributed.tables import EmbeddingTables
from hstu_dist.models.config import DLRMConfig, ModelConfig
from hstu_dist.models.dlrm import DLRMTower
from hstu_dist.models.ranking import RankingTower
from hstu_dist.models.ranking_shape import RankingShape
from hstu_dist.ops import backends


class Ranker(SharedModel):
    """Tables and a tower that predicts actions. All ranks call every method together."""

    tower: RankingTower | DLRMTower

    def __init__(
        self,
        tables: EmbeddingTables,
        model: ModelConfig,
        shape: RankingShape,
        device: torch.device,
        seed: int,
        dense: DenseSettings,
    ) -> None:
        torch.manual_seed(seed)
        super().__init__(tables, _tower(model, shape, device), dense)
        self.shape = shape

    def predict(self, items_ED: Tensor, batch: JaggedBatch, noise_key: int) -> Tensor:
        """Predictions [E, K] of every event; the backward averages over ranks.

        Args:
            items_ED: [E, D], table rows of the batch's events.
            batch: the batch.
            noise_key: key of the step's random numbers.
        """
        return self._parallel(items_ED, batch, noise_key)

    @torch.no_grad()
    def predict_local(self, items_ED: Tensor, batch: JaggedBatch) -> Tensor:
        """As `predict` in evaluation; where the tower is sharded, all ranks call it equally often."""
        return self._parallel.local(items_ED, batch, None)


def _tower(model: ModelConfig, shape: RankingShape, device: torch.device) -> RankingTower | DLRMTower:
    if isinstance(model, DLRMConfig):
        return DLRMTower(model, shape, device, backends.row_kernels(backends.fastest(device)))
    return RankingTower(model, shape, device)
