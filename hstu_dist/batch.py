"""JaggedBatch: the one batch type, from the reader to the loss; no padding anywhere."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class JaggedBatch:
    """B sequences laid end to end in T rows; sequence b owns rows offsets[b] to offsets[b+1].

    Row i of a sequence holds event i and, beside it, the event that follows: what to predict and when.
    Lengths 0 and 1 are legal, and so is a batch of no sequences.

    Attributes:
        offsets: [B+1] int64, starting at 0.
        item_ids: [T] int64, vocabulary ids of the events.
        timestamps: [T] int64 seconds, when each event happened (key times of the relative bias).
        actions: [T] int32, what the user did; 0 where the data has none.
        target_ids: [T] int64, the item that followed each event.
        query_times: [T] int64 seconds, when that following event happened (query times of the bias).
        row_ids: [B] int64, which sequence of the data set each one is; world-size-independent identity.
        trained: [T] bool, whether the target of each row counts in the loss; None: all do. Rows that do not count are
            context: a stream brings events that were targets before.
        contextual: [B, C] int64, codes of the user's contextual features, for ranking; None: no features.
    """

    offsets: Tensor
    item_ids: Tensor
    timestamps: Tensor
    actions: Tensor
    target_ids: Tensor
    query_times: Tensor
    row_ids: Tensor
    trained: Tensor | None = None
    contextual: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.row_ids.numel()

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.item_ids.numel()

    @property
    def lengths(self) -> Tensor:
        """[B] int64."""
        return self.offsets.diff()

    @property
    def num_context(self) -> int:
        """Rows whose targets do not count in the loss."""
        return 0 if self.trained is None else self.num_tokens - int(self.trained.sum())

    def parts(self, count: int) -> list[JaggedBatch]:
        """`count` runs of whole sequences with about equally many tokens each, in order; some may be empty."""
        if count == 1:
            return [self]
        # a sequence belongs to the part that its middle lies in
        middles = self.offsets[:-1] + self.offsets[1:]
        goals = torch.arange(1, count, device=middles.device) * (2 * self.num_tokens) // count
        cuts = [0, *torch.searchsorted(middles, goals).tolist(), self.num_sequences]
        return [self._run(first, last) for first, last in pairwise(cuts)]

    def _run(self, first: int, last: int) -> JaggedBatch:
        offsets = self.offsets[first : last + 1]
        start, stop = int(offsets[0]), int(offsets[-1])
        tokens = ("item_ids", "timestamps", "actions", "target_ids", "query_times")
        cut: dict[str, Any] = {name: getattr(self, name)[start:stop] for name in tokens}
        if self.trained is not None:
            cut["trained"] = self.trained[start:stop]
        if self.contextual is not None:
            cut["contextual"] = self.contextual[first:last]
        return JaggedBatch(offsets=offsets - start, row_ids=self.row_ids[first:last], **cut)

    def to(self, device: torch.device) -> JaggedBatch:
        """The same batch on another device."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: part if part is None else part.to(device, non_blocking=True) for name, part in parts.items()
        }
        return JaggedBatch(**moved)
