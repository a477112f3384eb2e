"""The recommender on one rank: a sharded item table and a tower that the ranks share."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.config import EmbeddingConfig, ParallelConfig
from hstu_dist.distributed.parallel import ParallelTower
from hstu_dist.distributed.tables import ItemTable, TableShape
from hstu_dist.models.config import HSTUConfig, TransformerConfig
from hstu_dist.models.context import sequence_context
from hstu_dist.models.tower import Tower

_CORPUS_CHUNK = 1 << 16


class Recommender(nn.Module):
    """Item table and tower. All ranks call every method together."""

    def __init__(
        self,
        num_items: int,
        model: HSTUConfig | TransformerConfig,
        embedding: EmbeddingConfig,
        device: torch.device,
        seed: int,
        parallel: ParallelConfig,
    ) -> None:
        super().__init__()
        self.num_items = num_items
        self.max_length = model.max_length
        self.table = ItemTable(TableShape(num_items, model.width), embedding, device, seed)
        torch.manual_seed(seed)
        self.tower = Tower(model, device)
        self._parallel = ParallelTower(self.tower, parallel)

    def encode(self, items_TD: Tensor, batch: JaggedBatch, noise_key: int) -> Tensor:
        """Unit vectors [T, D] that score the item after each event; the backward averages over ranks.

        Args:
            items_TD: [T, D], table rows of the batch's events.
            batch: the batch.
            noise_key: key of the step's random numbers.
        """
        vectors: Tensor = self._parallel(items_TD, sequence_context(batch, self.max_length, noise_key))
        return vectors

    def exchanging(self, wanted: bool) -> AbstractContextManager[None]:
        """Around `encode` and its backward: whether this backward averages; else its gradients stay on this rank."""
        return self._parallel.exchanging(wanted)

    @torch.no_grad()
    def encode_local(self, items_TD: Tensor, batch: JaggedBatch) -> Tensor:
        """As `encode` in evaluation; where the tower is sharded, all ranks call it equally often."""
        vectors: Tensor = self.tower(items_TD, sequence_context(batch, self.max_length, noise_key=None))
        return vectors

    def corpus(self) -> Tensor:
        """Rows [num_items, D] of the whole table, not normalised, on every rank."""
        return whole_table(self.table, next(self.tower.parameters()).device)


@torch.no_grad()
def whole_table(table: ItemTable, device: torch.device) -> Tensor:
    """All rows [num_rows, D] of a table, on every rank."""
    parts = []
    for start in range(0, table.shape.num_rows, _CORPUS_CHUNK):
        stop = min(start + _CORPUS_CHUNK, table.shape.num_rows)
        parts.append(table(torch.arange(start, stop, device=device)))
    return torch.cat(parts)
