"""The retrieval model on one rank."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.config import ITEM
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

    def in_rows(self, batch: JaggedBatch, admit: bool = False) -> tuple[JaggedBatch, Tensor]:
        """A batch whose items are rows of the item table, as all other methods want it.

        Args:
            batch: as the data has it.
            admit: whether it is trained on: only then new ids can get rows.

        Returns:
            The batch, and [T] bool, whether each target has a row of its own.
        """
        rows, known = self.rows_of(torch.cat([batch.item_ids, batch.target_ids]), admit)
        items, targets = rows.tensor_split([batch.num_tokens])
        return replace(batch, item_ids=items, target_ids=targets), known[batch.num_tokens :]

    def rows_of(self, ids_N: Tensor, admit: bool = False) -> tuple[Tensor, Tensor]:
        """Rows [N] of the item table for items [N] as the data has them, and [N] bool, whether it is theirs alone."""
        vocabulary = self.tables.vocabularies.get(ITEM)
        if vocabulary is None:
            return ids_N, torch.ones_like(ids_N, dtype=torch.bool)
        found = vocabulary.find(ids_N, admit)
        return found.rows, found.known

    def listed(self) -> Tensor | None:
        """[num_items] bool, rows that stand for an item; None: all may."""
        vocabulary = self.tables.vocabularies.get(ITEM)
        return None if vocabulary is None else vocabulary.occupied()

    def listed_rows(self) -> Tensor | None:
        """[N] int32, their numbers, ascending; None: all may."""
        vocabulary = self.tables.vocabularies.get(ITEM)
        return None if vocabulary is None else vocabulary.occupied_rows()

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
