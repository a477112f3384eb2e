"""The retrieval model on one rank."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.parallel import DenseSettings
from hstu_dist.distributed.shared_model import SharedModel
from hstu_dist.distributed.tables import EmbeddingTables
from hstu_dist.models.config import EncoderConfig
from hstu_dist.models.context import sequence_context
from hstu_dist.models.tower import Tower


class Recommender(SharedModel):
    """Tables and a tower that finds the next item. All ranks call every method together."""

    tower: Tower

    def __init__(
        self, tables: EmbeddingTables, model: EncoderConfig, device: torch.device, seed: int, dense: DenseSettings
    ) -> None:
        torch.manual_seed(seed)
        super().__init__(tables, Tower(model, device), dense)
        self.max_length = model.max_length

    def encode(self, items_TD: Tensor, batch: JaggedBatch, noise_key: int) -> Tensor:
        """Unit vectors [T, D] that score the item after each event; the backward averages over ranks.

        Args:
            items_TD: [T, D], table rows of the batch's events.
            batch: the batch.
            noise_key: key of the step's random numbers.
        """
        return self._parallel(items_TD, sequence_context(batch, self.max_length, noise_key))

    @torch.no_grad()
    def encode_local(self, items_TD: Tensor, batch: JaggedBatch) -> Tensor:
        """As `encode` in evaluation; where the tower is sharded, all ranks call it equally often."""
        return self._parallel.local(items_TD, sequence_context(batch, self.max_length, noise_key=None))
