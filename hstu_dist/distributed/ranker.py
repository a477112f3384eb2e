"""The ranking model on one rank: sharded tables and a ranking tower that the ranks share."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.config import ITEM
from hstu_dist.distributed.parallel import DenseSettings, ParallelTower
from hstu_dist.distributed.recommender import all_items
from hstu_dist.distributed.tables import EmbeddingTables
from hstu_dist.models.config import DLRMConfig, ModelConfig
from hstu_dist.models.dlrm import DLRMTower
from hstu_dist.models.ranking import RankingTower
from hstu_dist.models.ranking_shape import RankingShape
from hstu_dist.ops import backends


class Ranker(nn.Module):
    """Tables and ranking tower. All ranks call every method together."""

    def __init__(
        self,
        tables: EmbeddingTables,
        model: ModelConfig,
        shape: RankingShape,
        device: torch.device,
        seed: int,
        dense: DenseSettings,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.tables = tables
        torch.manual_seed(seed)
        self.tower: RankingTower | DLRMTower
        if isinstance(model, DLRMConfig):
            self.tower = DLRMTower(model, shape, device, backends.row_kernels(backends.fastest(device)))
        else:
            self.tower = RankingTower(model, shape, device)
        self._parallel = ParallelTower(self.tower, dense)

    def items(self, ids_U: Tensor) -> Tensor:
        """Rows [U, D] of the item table."""
        rows: dict[str, Tensor] = self.tables({ITEM: ids_U})
        return rows[ITEM]

    def predict(self, items_ED: Tensor, batch: JaggedBatch, noise_key: int) -> Tensor:
        """Predictions [E, K] of every event; the backward averages over ranks.

        Args:
            items_ED: [E, D], table rows of the batch's events.
            batch: the batch.
            noise_key: key of the step's random numbers.
        """
        predicted: Tensor = self._parallel(items_ED, batch, noise_key)
        return predicted

    def exchanging(self, wanted: bool) -> AbstractContextManager[None]:
        """Around `predict` and its backward: whether this backward averages; else its gradients stay on this rank."""
        return self._parallel.exchanging(wanted)

    @torch.no_grad()
    def predict_local(self, items_ED: Tensor, batch: JaggedBatch) -> Tensor:
        """As `predict` in evaluation; where the tower is sharded, all ranks call it equally often."""
        predicted: Tensor = self._parallel.local(items_ED, batch, None)
        return predicted

    def corpus(self) -> Tensor:
        """Rows [num_items, D] of the whole table, on every rank."""
        return all_items(self.tables, next(self.tower.parameters()).device)
