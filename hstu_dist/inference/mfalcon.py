"""M-FALCON (section 3.4 of arXiv 2402.17152): many candidates for the price of few.

The keys and values of a history are computed once and serve all candidates, which are appended to it in micro-batches:
each candidate sees the history and itself, and all of them have the position and time that a single one would have. So
each gets what it would get alone. With a cache, histories are also kept between requests: a longer one of the same user
costs only its new tokens.

Shapes: B users, T history tokens, M candidates, D width, H heads, Q and V head widths.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hstu_dist.inference.batches import Candidates, History, MicroBatch, Part, passes
from hstu_dist.inference.cache import StateCache, UserState
from hstu_dist.inference.passes import Memory, Segment, context_of, tokens_of
from hstu_dist.models.context import SequenceContext


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A sequence model, and what is wanted of it at candidates.

    Attributes:
        embed: [T, C] int64 → [T, D], vectors of tokens; neither position nor time is known to it.
        encode: ([T, D], context) → [T, D], with positions, times and layout of the context.
        weights: everything that both depend on; a change of any of them invalidates what was cached.
        max_length: N, positions that it has, the candidates' included.
        head: [m, D] → [m, K], applied to the outputs at candidates, pass by pass; by default they are kept as they are.
    """

    embed: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor, SequenceContext], Tensor]
    weights: tuple[Tensor, ...]
    max_length: int
    head: Callable[[Tensor], Tensor] = lambda outputs: outputs


@dataclass(frozen=True)
class Encoded:
    """What the encoder gave.

    Attributes:
        candidates: [M, K], what the head made of the output at each candidate.
        last: [B, D], at the last token of each history; zeros for an empty one.
    """

    candidates: Tensor
    last: Tensor


class Scorer:
    """Encodes candidates after histories. For one thread."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        # of this scorer alone: another one's tensors may lie where these did
        self._identity = uuid.uuid4().hex

    def version(self) -> Hashable:
        """Changes whenever a weight is changed in place, by an optimizer or by loading."""
        return self._identity, tuple(weight._version for weight in self.encoder.weights)

    @torch.no_grad()
    def score(
        self,
        history: History,
        candidates: Candidates,
        micro_batch: MicroBatch | None = None,
        cache: StateCache | None = None,
    ) -> Encoded:
        """Outputs at candidates and at the ends of histories, as if each candidate had been appended alone.

        Memory grows with the longest history plus one micro-batch, not with their product or the number of candidates.

        Args:
            history: of B users.
            candidates: of the same users; none is legal.
            micro_batch: bounds of one pass; None: the defaults.
            cache: where histories are kept between calls, if `history.users` says whose they are.

        Raises:
            ValueError: the two do not fit each other, or a history is longer than the encoder's positions allow.
        """
        self._check(history, candidates)
        job = _Job(self, history, candidates, cache)
        for parts in passes(history, candidates, micro_batch or MicroBatch()):
            job.run(parts)
        return Encoded(job.at_candidates, job.at_last)

    def _check(self, history: History, candidates: Candidates) -> None:
        if candidates.times.numel() != history.num_users:
            raise ValueError(
                f"candidates: got {candidates.times.numel()} users, expected {history.num_users} as in history"
            )
        if candidates.tokens.shape[1] != history.tokens.shape[1]:
            raise ValueError(
                f"candidates.tokens: got {candidates.tokens.shape[1]} numbers a token, "
                f"expected {history.tokens.shape[1]} as in history"
            )
        targeted = (candidates.offsets.diff() > 0).long()
        too_long = history.offsets.diff() + targeted > self.encoder.max_length
        if bool(too_long.any()):
            user = int(too_long.nonzero()[0])
            length = int(history.offsets.diff()[user])
            raise ValueError(
                f"history: got {length} tokens of user {user}, expected at most "
                f"{self.encoder.max_length - int(targeted[user])}; keep the most recent ones"
            )


class _Job:
    """One call of `score`: its results so far, and the states that its later passes need."""

    def __init__(self, scorer: Scorer, history: History, candidates: Candidates, cache: StateCache | None) -> None:
        self.encoder = scorer.encoder
        self.version = scorer.version()
        self.history = history
        self.candidates = candidates
        self.cache = StateCache(0) if cache is None else cache
        # None: not kept
        self.users = [None] * history.num_users if cache is None or history.users is None else history.users
        self.rows = [range(*pair) for pair in pairwise(history.offsets.tolist())]
        columns = [history.tokens, history.key_times[:, None], history.query_times[:, None]]
        if history.num_contextual is not None:
            # they see each other, so that all that follows depends on how many they are
            lengths = history.offsets.diff()
            columns.append(torch.repeat_interleave(history.num_contextual, lengths)[:, None])
        self.identity = torch.cat(columns, dim=1)
        # of users with more candidates to come
        self.states: dict[int, UserState] = {}
        vectors = self.encoder.embed(history.tokens[:0])
        self.at_candidates = vectors.new_empty(candidates.tokens.shape[0], self.encoder.head(vectors).shape[1])
        self.at_last = vectors.new_zeros(history.num_users, vectors.shape[1])

    def run(self, parts: Sequence[Part]) -> None:
        """One pass."""
        segments: list[Segment] = []
        for part in parts:
            segments.append(self._segment(part, start=segments[-1].end if segments else 0))
        out, memory = self.at_last[:0], Memory(segments)
        if segments[-1].end:
            vectors = self.encoder.embed(tokens_of(self.history, self.candidates, segments))
            out = self.encoder.encode(vectors, context_of(self.history, self.candidates, segments, memory))
        for part, segment in zip(parts, segments, strict=True):
            state = self._take(segment, out, memory)
            self.states.pop(part.user, None)
            if state is not None and not part.is_last:
                self.states[part.user] = state

    def _segment(self, part: Part, start: int) -> Segment:
        history = self.rows[part.user]
        state, known = self._known(part.user)
        return Segment(
            user=part.user,
            history=history,
            known=known,
            candidates=range(part.first, part.end),
            start=start,
            state=state if known else None,
            keep=known < len(history) and (self._cached(part.user) or not part.is_last),
        )

    def _known(self, user: int) -> tuple[UserState | None, int]:
        """A state, and how many tokens of the user's history it serves."""
        state = self.states.get(user)
        if state is not None:
            return state, len(self.rows[user])
        if not self._cached(user):
            return None, 0
        state = self.cache.get(self.users[user], self.version)
        known = 0 if state is None else self._shared(state, user)
        self.cache.count(hit=known > 0)
        return state, known

    def _shared(self, state: UserState, user: int) -> int:
        """How many first tokens of the user's history a state of an earlier one serves."""
        wanted = self._identity(user)
        known = state.common_prefix(wanted)
        if known == len(wanted) < len(state.identity):
            # what the encoder gave at this token has been replaced by what it gave at a later one
            known = max(0, known - 1)
        contextual = 0 if self.history.num_contextual is None else int(self.history.num_contextual[user])
        # contextual tokens see each other: all of them are known or none
        return known if known >= contextual else 0

    def _take(self, segment: Segment, out: Tensor, memory: Memory) -> UserState | None:
        """Stores what a pass gave for a segment; returns the state of the whole history if there is one."""
        first_candidate = segment.start + segment.num_new
        if segment.candidates:
            segment.of_candidates(self.at_candidates).copy_(self.encoder.head(out[first_candidate : segment.end]))
        state = segment.state
        if segment.num_new:
            last = out[first_candidate - 1]
            state = self._keep(segment, last, memory) if segment.keep else None
        elif state is not None:
            last = state.last
        else:
            return None
        self.at_last[segment.user] = last
        return state

    def _keep(self, segment: Segment, last: Tensor, memory: Memory) -> UserState:
        state = UserState(
            identity=self._identity(segment.user).clone(),
            keys=tuple(memory.keys[segment.user]),
            values=tuple(memory.values[segment.user]),
            last=last.clone(),
        )
        if self._cached(segment.user):
            self.cache.put(self.users[segment.user], self.version, state)
        return state

    def _cached(self, user: int) -> bool:
        return self.users[user] is not None

    def _identity(self, user: int) -> Tensor:
        rows = self.rows[user]
        return self.identity[rows.start : rows.stop]
