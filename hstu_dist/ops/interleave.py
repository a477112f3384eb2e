"""Interleaved sequences of generative ranking: contextual tokens, then item_0, action_0, item_1, action_1, ...

Shapes: B sequences, E events, C contextual tokens a sequence, T = B·C + 2·E tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_dist.ops.jagged import positions, sequence_of


@dataclass(frozen=True)
class Interleaving:
    """Where the tokens of a jagged batch lie once its events are interleaved (hstu.md's generative ranking).

    Attributes:
        offsets: [B+1] int64, of the token sequences.
        contextual: [B·C] int64, token rows of the contextual tokens, sequence after sequence.
        items: [E] int64, token row of each event's item; it predicts the event's action.
        actions: [E] int64, token row of each event's action, right after its item.
    """

    offsets: Tensor
    contextual: Tensor
    items: Tensor
    actions: Tensor

    @classmethod
    def of(cls, event_offsets: Tensor, num_contextual: int) -> Interleaving:
        """Of sequences of events.

        Args:
            event_offsets: [B+1] int64.
            num_contextual: C.
        """
        B, device = event_offsets.numel() - 1, event_offsets.device
        offsets = 2 * event_offsets + num_contextual * torch.arange(B + 1, device=device)
        firsts = offsets[:-1]
        contextual = (firsts[:, None] + torch.arange(num_contextual, device=device)).reshape(-1)
        items = firsts[sequence_of(event_offsets)] + num_contextual + 2 * positions(event_offsets)
        return cls(offsets, contextual, items, items + 1)

    def merge(self, contextual: Tensor, items: Tensor, actions: Tensor) -> Tensor:
        """Rows or values of all tokens in their order.

        Args:
            contextual: [B·C, ...], as `self.contextual`.
            items: [E, ...].
            actions: [E, ...].

        Returns:
            [T, ...].
        """
        rows = torch.cat([self.contextual, self.items, self.actions])
        source = torch.empty_like(rows)
        source[rows] = torch.arange(rows.numel(), device=rows.device)
        return torch.cat([contextual, items, actions]).index_select(0, source)
