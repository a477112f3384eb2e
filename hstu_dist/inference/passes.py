"""One pass through the encoder: new history tokens and candidates of several users, after what is already known.

Shapes: T new tokens, D width, H heads, Q and V head widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hstu_dist.inference.batches import Candidates, History
from hstu_dist.inference.cache import UserState
from hstu_dist.models.context import SequenceContext
from hstu_dist.ops.spec import JaggedLayout


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A user's share of a pass: the history tokens that no state has, then candidates.

    Attributes:
        user: index of the user.
        history: rows of the user's whole history among all history tokens.
        known: first history tokens that need not be computed.
        candidates: rows of the share's candidates among all candidates.
        start: first row of the share in the pass.
        state: has keys and values of the known tokens; None if there are none.
        keep: keys and values of the whole history are wanted afterwards.
    """

    user: int
    history: range
    known: int
    candidates: range
    start: int
    state: UserState | None
    keep: bool

    @property
    def num_new(self) -> int:
        """History tokens to compute."""
        return len(self.history) - self.known

    @property
    def end(self) -> int:
        """Row after the last one of the share in the pass."""
        return self.start + self.num_new + len(self.candidates)

    def new(self, of_history: Tensor) -> Tensor:
        """Of a tensor of all history tokens, the rows to compute."""
        return of_history[self.history.start + self.known : self.history.stop]

    def whole(self, of_history: Tensor) -> Tensor:
        """Of a tensor of all history tokens, the user's rows."""
        return of_history[self.history.start : self.history.stop]

    def of_candidates(self, x: Tensor) -> Tensor:
        """Of a tensor of all candidates, the rows of the share."""
        return x[self.candidates.start : self.candidates.stop]

    def time(self, candidates: Candidates) -> Tensor:
        """The request's time, for each candidate of the share."""
        return candidates.times[self.user].expand(len(self.candidates))


@dataclass(frozen=True)
class Memory:
    """Joins the keys of states with those of the pass, layer by layer, and keeps what is wanted afterwards.

    Attributes:
        segments: of the pass.
        keys: by user, for each layer so far [n, H, Q].
        values: by user, for each layer so far [n, H, V].
    """

    segments: Sequence[Segment]
    keys: dict[int, list[Tensor]] = field(default_factory=dict)
    values: dict[int, list[Tensor]] = field(default_factory=dict)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `KeyMemory.extend`."""
        joined_k = self._join(k, lambda state: state.keys[layer], self.keys)
        joined_v = self._join(v, lambda state: state.values[layer], self.values)
        return joined_k, joined_v

    def _join(self, new: Tensor, of: Callable[[UserState], Tensor], kept: dict[int, list[Tensor]]) -> Tensor:
        joined = new
        if any(s.known for s in self.segments):
            pieces = []
            for segment in self.segments:
                if segment.state is not None:
                    pieces.append(of(segment.state)[: segment.known])
                pieces.append(new[segment.start : segment.end])
            joined = torch.cat(pieces)
        first = 0
        for segment in self.segments:
            if segment.keep:
                # a copy: a view would keep the candidates alive, and the whole projection
                kept.setdefault(segment.user, []).append(joined[first : first + len(segment.history)].clone())
            first += len(segment.history) + len(segment.candidates)
        return joined


def tokens_of(history: History, candidates: Candidates, segments: Sequence[Segment]) -> Tensor:
    """Numbers [T, C] of the tokens of a pass."""
    return _gather(segments, lambda s: (s.new(history.tokens), s.of_candidates(candidates.tokens)))


def context_of(
    history: History, candidates: Candidates, segments: Sequence[Segment], memory: Memory
) -> SequenceContext:
    """Layout, positions and times of a pass."""
    device = history.tokens.device
    query_times = _gather(segments, lambda s: (s.new(history.query_times), s.time(candidates)))
    key_times = _gather(segments, lambda s: (s.whole(history.key_times), s.time(candidates)))
    positions = _gather(
        segments,
        lambda s: (
            torch.arange(s.known, len(s.history), device=device),
            torch.full((len(s.candidates),), len(s.history), device=device),
        ),
    )
    return SequenceContext(
        layout=_layout(history, segments),
        positions=positions,
        query_times=query_times,
        key_times=key_times,
        noise=None,
        memory=memory,
    )


def _layout(history: History, segments: Sequence[Segment]) -> JaggedLayout:
    device = history.offsets.device

    def counts(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    keys = counts([0, *(len(s.history) + len(s.candidates) for s in segments)]).cumsum(0)
    targets = [len(s.candidates) for s in segments]
    contextual = history.num_contextual
    return JaggedLayout(
        counts([0, *(s.end for s in segments)]),
        keys if any(s.known for s in segments) else None,
        None if contextual is None else contextual[counts([s.user for s in segments])],
        counts(targets) if any(targets) else None,
    )


def _gather(segments: Sequence[Segment], pieces: Callable[[Segment], tuple[Tensor, Tensor]]) -> Tensor:
    """Values of history and candidates of each segment, in the order of the pass."""
    return torch.cat([piece for segment in segments for piece in pieces(segment)])
