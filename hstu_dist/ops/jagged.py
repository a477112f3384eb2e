"""Index arithmetic on jagged batches, without padding and without a loop over sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def positions(offsets: Tensor) -> Tensor:
    """Index of each token within its sequence.

    Args:
        offsets: [B+1] int64.

    Returns:
        [T] int64: 0, 1, ..., n_0 - 1, 0, 1, ..., n_1 - 1, ...
    """
    total = int(offsets[-1])
    starts = offsets[:-1].repeat_interleave(offsets.diff(), output_size=total)
    return torch.arange(total, device=offsets.device) - starts


def sequence_of(offsets: Tensor) -> Tensor:
    """Index [T] int64 of the sequence that owns each token."""
    index = torch.arange(offsets.numel() - 1, device=offsets.device)
    return index.repeat_interleave(offsets.diff(), output_size=int(offsets[-1]))


def last_rows(offsets: Tensor) -> Tensor:
    """Row [B] int64 of the last token of each sequence.

    Raises:
        ValueError: a sequence is empty and has no last token.
    """
    empty = offsets.diff() == 0
    if bool(empty.any()):
        raise ValueError(f"offsets: got an empty sequence at {int(empty.nonzero()[0])}, expected at least one token")
    return offsets[1:] - 1


_TABLE_LIMIT = 1 << 24
"""Largest id range for which a direct lookup table beats sorting."""


class IdSet:
    """The distinct ids that a step needs, and the way from an id to its place among them.

    Looking each id up once saves communication; everything else of the step works with places.

    Attributes:
        ids: [U] int64, ascending.
    """

    def __init__(self, ids: Tensor, table: Tensor | None = None) -> None:
        """The set of ascending `ids`; `table`, if given, has the place of each id, [high]."""
        self.ids = ids
        self._table = table
        # nothing is missing: each id is its own place
        self._complete = False

    @classmethod
    def everything(cls, high: int, device: torch.device) -> IdSet:
        """All ids in [0, high)."""
        complete = cls(torch.arange(high, device=device))
        complete._complete = True
        return complete

    @classmethod
    def of(cls, ids: list[Tensor], high: int) -> IdSet:
        """Distinct ids of some tensors.

        Args:
            ids: int64 tensors of any shape, values in [0, high).
            high: number of possible ids.
        """
        if high > _TABLE_LIMIT:
            return cls(torch.cat([part.reshape(-1) for part in ids]).unique())
        present = torch.zeros(high, dtype=torch.bool, device=ids[0].device)
        for part in ids:
            present[part.reshape(-1)] = True
        return cls(present.nonzero().squeeze(1), present.cumsum(0) - 1)

    def places(self, ids: Tensor) -> Tensor:
        """Rows of `self.ids` that hold `ids`, all of which must be in the set; int64, same shape."""
        if self._complete:
            return ids
        if self._table is None:
            return torch.searchsorted(self.ids, ids)
        return self._table.index_select(0, ids.reshape(-1)).view(ids.shape)
