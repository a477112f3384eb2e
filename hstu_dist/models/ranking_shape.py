"""What a ranking model reads and predicts; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hstu_dist.actions import WORD_BITS, ActionField
from hstu_dist.models.config import EncoderConfig

POOLED = 3
"""Sums over the history that DLRM reads: items, actions, and items times actions."""

DENSE = 2
"""Numbers that it reads: how many earlier events there are, and how long ago the last one was."""


@dataclass(frozen=True, kw_only=True)
class RankingShape:
    """What a ranking model reads and predicts.

    Attributes:
        num_items: rows of the item table.
        actions: fields of the action word, each with the number of its levels (see `models.ranking.field_levels`).
        contextual: number of values of each contextual feature; a code outside of it stands for an unknown value.
        outputs: K, numbers predicted for each event.
        head_width: hidden width of the heads.
    """

    num_items: int
    actions: tuple[tuple[ActionField, int], ...]
    contextual: tuple[int, ...]
    outputs: int
    head_width: int


def token_encoder(config: EncoderConfig, num_contextual: int) -> EncoderConfig:
    """The encoder of interleaved tokens: 2N + C of them for N events, the longest that `config` serves."""
    return replace(config, max_length=2 * config.max_length + num_contextual)


def embedding_rows(field: ActionField, levels: int) -> int:
    """Rows of the embedding of a field: of a plain number `levels`, which it must stay below."""
    if counts_by_magnitude(field, levels):
        return field.bits + 1
    return field.largest + 1 if field.bits < WORD_BITS else levels


def largest_number(field: ActionField, levels: int) -> int:
    """The largest number of a field that its embedding has a row for."""
    return field.largest if field.bits < WORD_BITS else levels - 1


def counts_by_magnitude(field: ActionField, levels: int) -> bool:
    """Whether the levels of a field are orders of magnitude: it is packed and holds numbers of `levels` and above."""
    return field.bits < WORD_BITS and levels <= field.largest
