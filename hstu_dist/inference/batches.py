"""What is scored: histories and candidates of several users, jagged, and how they are divided into passes.

Shapes: B users, T history tokens, M candidates, C numbers that a token is made from.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class History:
    """Histories of B users, laid end to end, oldest token first.

    A token is C numbers, for example the id of an item: what they mean is the encoder's business. Two tokens with
    equal numbers and times have the same vector.

    Attributes:
        offsets: [B+1] int64, starting at 0.
        tokens: [T, C] int64.
        key_times: [T] int64 seconds, when each event happened.
        query_times: [T] int64 seconds, when the token after each one happened; of the last one the time of the request.
        users: [B], whose they are, for the cache; None, of one or of all: not kept.
        num_contextual: [B] int64, first tokens that see exactly each other; None: none.
    """

    offsets: Tensor
    tokens: Tensor
    key_times: Tensor
    query_times: Tensor
    users: Sequence[Hashable] | None = None
    num_contextual: Tensor | None = None

    def __post_init__(self) -> None:
        check_offsets("history.offsets", self.offsets)
        total = int(self.offsets[-1])
        check_int64("history.tokens", self.tokens, total, dimensions=2)
        for name in ("key_times", "query_times"):
            check_int64(f"history.{name}", getattr(self, name), total)
        if self.users is not None and len(self.users) != self.num_users:
            raise ValueError(f"history.users: got {len(self.users)}, expected {self.num_users} as in offsets")
        if self.num_contextual is not None:
            check_int64("history.num_contextual", self.num_contextual, self.num_users)
            if bool((self.num_contextual < 0).any() or (self.num_contextual > self.offsets.diff()).any()):
                raise ValueError("history.num_contextual: got more than the tokens or fewer than 0, expected 0 to n")

    @property
    def num_users(self) -> int:
        """B."""
        return self.offsets.numel() - 1


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Candidates of B users, laid end to end.

    Attributes:
        offsets: [B+1] int64, starting at 0.
        tokens: [M, C] int64; a user's may repeat.
        times: [B] int64 seconds, of each request: key and query time of all its candidates.
    """

    offsets: Tensor
    tokens: Tensor
    times: Tensor

    def __post_init__(self) -> None:
        check_offsets("candidates.offsets", self.offsets)
        check_int64("candidates.tokens", self.tokens, int(self.offsets[-1]), dimensions=2)
        check_int64("candidates.times", self.times, self.offsets.numel() - 1)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """How much one pass through the encoder takes at most; a single user's history is never divided.

    Attributes:
        candidates: over all users of the pass.
        tokens: of the histories of these users, cached or not.
    """

    candidates: int = 1024
    tokens: int = 1 << 14

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.tokens < 1:
            raise ValueError(f"MicroBatch: got {self.candidates} candidates, {self.tokens} tokens, expected >= 1")


@dataclass(frozen=True)
class Part:
    """Candidates `first` to `end` - 1 of a user, counted over all users; `is_last`: the user has no more."""

    user: int
    first: int
    end: int
    is_last: bool


def passes(history: History, candidates: Candidates, limits: MicroBatch) -> Iterator[list[Part]]:
    """Users in order, as many in a pass as fit; one with many candidates has several passes of its own."""
    lengths, bounds = history.offsets.diff().tolist(), candidates.offsets.tolist()
    pending: list[Part] = []
    count = tokens = 0
    for part in _parts(bounds, limits.candidates):
        size, length = part.end - part.first, lengths[part.user]
        if pending and (count + size > limits.candidates or tokens + length > limits.tokens):
            yield pending
            pending, count, tokens = [], 0, 0
        pending.append(part)
        count, tokens = count + size, tokens + length
    if pending:
        yield pending


def _parts(bounds: list[int], most: int) -> Iterator[Part]:
    for user, (first, end) in enumerate(pairwise(bounds)):
        for start in range(first, end, most) if end > first else (first,):
            yield Part(user, start, min(start + most, end), is_last=start + most >= end)


def check_offsets(name: str, offsets: Tensor) -> None:
    """Whether these are offsets [B+1].

    Raises:
        ValueError: another dtype or shape, a first one that is not 0, or a smaller one after a larger.
    """
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.numel() < 1:
        raise ValueError(f"{name}: got {offsets.dtype} of shape {tuple(offsets.shape)}, expected torch.int64 [B+1]")
    if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
        raise ValueError(f"{name}: got {offsets.tolist()[:8]}, expected 0 first and never less than before")


def check_int64(name: str, x: Tensor, rows: int, dimensions: int = 1) -> None:
    """Whether a tensor is int64 with so many rows.

    Raises:
        ValueError: it is not.
    """
    if x.dtype != torch.int64 or x.dim() != dimensions or x.shape[0] != rows:
        shape = f"[{rows}]" if dimensions == 1 else f"[{rows}, C]"
        raise ValueError(f"{name}: got {x.dtype} of shape {tuple(x.shape)}, expected torch.int64 {shape}")
