"""A model on one rank: sharded tables, and a tower that the ranks share."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from hstu_dist.distributed.config import ITEM
from hstu_dist.distributed.parallel import DenseSettings, ParallelTower
from hstu_dist.distributed.tables import EmbeddingTables

_CORPUS_CHUNK = 1 << 16


class SharedModel(nn.Module):
    """Tables and tower. All ranks call every method together.

    Attributes:
        num_items: rows of the item table.
        tables: sharded.
        tower: alike on all ranks, or a part of it on each.
    """

    def __init__(self, tables: EmbeddingTables, tower: nn.Module, dense: DenseSettings) -> None:
        """Shares `tower`, whose parameters are alike on all ranks."""
        super().__init__()
        self.num_items = tables.specs[ITEM].shape.num_rows
        self.tables = tables
        self.tower = tower
        self._parallel = ParallelTower(tower, dense)

    def items(self, ids_U: Tensor) -> Tensor:
        """Rows [U, D] of the item table."""
        rows: dict[str, Tensor] = self.tables({ITEM: ids_U})
        return rows[ITEM]

    def exchanging(self, wanted: bool) -> AbstractContextManager[None]:
        """Around a forward and its backward: whether this backward averages; else its gradients stay on this rank."""
        return self._parallel.exchanging(wanted)

    @torch.no_grad()
    def corpus(self) -> Tensor:
        """All rows [num_items, D] of the item table, not normalised, on every rank."""
        device = next(self.tower.parameters()).device
        parts = []
        for start in range(0, self.num_items, _CORPUS_CHUNK):
            ids = torch.arange(start, min(start + _CORPUS_CHUNK, self.num_items), device=device)
            parts.append(self.items(ids))
        return torch.cat(parts)
