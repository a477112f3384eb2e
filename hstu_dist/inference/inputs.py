"""What a model reads of a request, and the checks that files and HTTP share; no torch.

Shapes: B requests, E events, C contextual features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from hstu_dist.actions import ActionField
from hstu_dist.inference.requests import UNKNOWN, Ints, RequestError, Requests, ValueIndex


@dataclass(frozen=True)
class ActionInput:
    """A number that every event has: `field` of the action word, from 0 to `most`."""

    field: ActionField
    most: int


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a model reads.

    Attributes:
        items: the items that it was trained on.
        max_events: of a history, the last ones.
        needs_history: it has no answer to an empty history.
        actions: what the user did with each item, by the name of the column; empty: the model reads none.
        contextual: what is known of the user, by name, with the values of training; `user` is who it is.
    """

    items: ValueIndex
    max_events: int
    needs_history: bool = True
    actions: Mapping[str, ActionInput] = field(default_factory=dict)
    contextual: Mapping[str, ValueIndex] = field(default_factory=dict)

    def words(self, offsets: Ints, columns: Mapping[str, Ints]) -> Ints:
        """Action words [E] of the columns of actions.

        Args:
            offsets: [B+1] int64, of events.
            columns: each [E] int64.

        Raises:
            RequestError: other columns than the model reads, or a number that it cannot.
        """
        _same_names("actions", self.actions, columns)
        words = np.zeros(int(offsets[-1]), dtype=np.int64)
        for name, column in self.actions.items():
            values = columns[name]
            wrong = (values < 0) | (values > column.most)
            if wrong.any():
                event = int(wrong.argmax())
                row = int(np.searchsorted(offsets, event, side="right")) - 1
                problem = f"got {values[event]} as event {event - int(offsets[row])}, expected 0 to {column.most}"
                raise RequestError(row, name, problem, "send actions as the run's data has them")
            words |= values << column.field.shift
        return words

    def codes(self, columns: Mapping[str, Sequence[Any]], count: int) -> Ints | None:
        """Codes [B, C] of what is known of each user; values that training never saw, and None, are UNKNOWN.

        Args:
            columns: B values each.
            count: B.

        Raises:
            RequestError: other columns than the model reads, or values of another type.
        """
        _same_names("context", self.contextual, columns)
        if not self.contextual:
            return None
        codes = np.full((count, len(self.contextual)), UNKNOWN, dtype=np.int64)
        for place, (name, index) in enumerate(self.contextual.items()):
            for row, value in enumerate(columns[name]):
                if value is None:
                    continue
                try:
                    codes[row, place] = index.encode([value])[0]
                except ValueError as error:
                    raise RequestError(row, name, str(error), "send it as the run's data has it, or null") from error
        return codes

    def ready(self, requests: Requests, unknown: Literal["error", "skip"]) -> Requests:
        """Requests that the model can answer: checked, without unknown events, cut to what it reads.

        Args:
            requests: as they came.
            unknown: see `ModelUse`.

        Raises:
            RequestError: the first that makes no sense, or names unknown items and they are refused.
        """
        requests.check()
        requests = requests.known(unknown)
        if self.needs_history and unknown == "error":
            requests.expect_history()
        return requests.most_recent(self.max_events)


def _same_names(field_name: str, expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    if set(expected) != set(got):
        wanted = ", ".join(expected) or "none: the model reads none"
        problem = f"got {', '.join(map(str, got)) or 'none'}, expected {wanted}"
        raise RequestError(0, field_name, problem, "see docs/inference.md")
