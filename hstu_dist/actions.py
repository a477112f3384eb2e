"""The action word: everything that a user did with an item, packed into the one integer that an event stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WORD_BITS = 31
"""Bits of an action word: it is a non-negative int32."""

WHOLE_WORD = "action"
"""Name of the only field of a data set whose action is one plain number."""


@dataclass(frozen=True)
class ActionField:
    """Some bits of the action word that hold one number.

    Attributes:
        name: column of the event log.
        shift: its lowest bit.
        bits: how many; it holds 0 to 2^bits - 1.
    """

    name: str
    shift: int
    bits: int

    @property
    def largest(self) -> int:
        """The largest number that it holds."""
        return (1 << self.bits) - 1

    def of(self, words: Any) -> Any:
        """Its numbers in an integer array or tensor of words, same type and shape."""
        return (words >> self.shift) & self.largest


def action_fields(widths: Mapping[str, int]) -> tuple[ActionField, ...]:
    """Fields of a word.

    Args:
        widths: name → bits, from the lowest bit up; empty: the word is one plain number.

    Raises:
        ValueError: a width below 1, or more than 31 bits in all.
    """
    if not widths:
        return (ActionField(WHOLE_WORD, 0, WORD_BITS),)
    fields, shift = [], 0
    for name, bits in widths.items():
        if bits < 1:
            raise ValueError(f"{name}: got {bits} bits, expected at least 1")
        fields.append(ActionField(name, shift, bits))
        shift += bits
    if shift > WORD_BITS:
        raise ValueError(f"{', '.join(widths)}: got {shift} bits together, expected at most {WORD_BITS}")
    return tuple(fields)
