"""The recommender on one rank: sharded tables and a tower that the ranks share."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.config import ITEM
from hstu_dist.distributed.parallel import DenseSettings, ParallelTower
from hstu_dist.distributed.tables import EmbeddingTables
from hstu_dist.models.config import EncoderConfig
from hstu_dist.models.context import sequence_context
from hstu_dist.models.tower import Tower

_CORPUS_CHUNK = 1 << 16


class Recommender(nn.Module):
    """Tables and tower. All ranks call every method together."""

    def __init__(
        self,
        tables: EmbeddingTables,
        model: EncoderConfig,
        device: torch.device,
        seed: int,
        dense: DenseSettings,
    ) -> None:
        super().__init__()
        self.num_items = tables.specs[ITEM].shape.num_rows
        self.max_length = model.max_length
        self.tables = tables
        torch.manual_seed(seed)
        self.tower = Tower(model, device)
        self._parallel = ParallelTower(self.tower, dense)

    def items(self, ids_U: Tensor) -> Tensor:
        """Rows [U, D] of the item table."""
        rows: dict[str, Tensor] = self.tables({ITEM: ids_U})
        return rows[ITEM]

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
        vectors: Tensor = self._parallel.local(items_TD, sequence_context(batch, self.max_length, noise_key=None))
        return vectors

    def corpus(self) -> Tensor:
        """Rows [num_items, D] of the whole table, not normalised, on every rank."""
        return all_items(self.tables, next(self.tower.parameters()).device)


@torch.no_grad()
def all_items(tables: EmbeddingTables, device: torch.device) -> Tensor:
    """All rows [num_items, D] of the item table, on every rank."""
    num_items = tables.specs[ITEM].shape.num_rows
    parts = []
    for start in range(0, num_items, _CORPUS_CHUNK):
        ids = torch.arange(start, min(start + _CORPUS_CHUNK, num_items), device=device)
        parts.append(tables({ITEM: ids})[ITEM])
    return torch.cat(parts)
