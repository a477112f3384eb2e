"""What was computed of users' histories, kept between requests: bounded in bytes, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class UserState:
    """A history of n tokens as every layer's attention sees it.

    Attributes:
        identity: [n, C] int64, everything that the tokens were computed from, beside the weights.
        keys: for each layer [n, H, Q].
        values: for each layer [n, H, V].
        last: [D], what the encoder gave at the last token.
    """

    identity: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    last: Tensor

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        tensors = (self.identity, self.last, *self.keys, *self.values)
        return sum(x.numel() * x.element_size() for x in tensors)

    def common_prefix(self, identity: Tensor) -> int:
        """How many first tokens another history shares with this one.

        Args:
            identity: [m, C] int64.
        """
        if identity.shape[1] != self.identity.shape[1]:
            return 0
        length = min(identity.shape[0], self.identity.shape[0])
        same = (identity[:length] == self.identity[:length]).all(dim=1)
        return int(same.long().cumprod(0).sum())


@dataclass
class CacheStatistics:
    """What a cache did so far.

    Attributes:
        hits: histories of which something was known, all of it or a prefix.
        misses: histories that were computed anew from their first token.
        evictions: states that made room for others.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class StateCache:
    """States by user, for one version of the weights at a time; for one thread.

    Attributes:
        statistics: counts since it was made.
    """

    def __init__(self, max_bytes: int) -> None:
        """An empty cache.

        Args:
            max_bytes: bound of the states' tensors together; 0 keeps nothing.

        Raises:
            ValueError: a negative bound.
        """
        if max_bytes < 0:
            raise ValueError(f"max_bytes: got {max_bytes}, expected >= 0")
        self.max_bytes = max_bytes
        self.statistics = CacheStatistics()
        self._states: OrderedDict[Hashable, UserState] = OrderedDict()
        self._bytes = 0
        self._version: Hashable = None

    def __len__(self) -> int:
        """Number of states."""
        return len(self._states)

    @property
    def num_bytes(self) -> int:
        """Memory of all states."""
        return self._bytes

    def get(self, user: Hashable, version: Hashable) -> UserState | None:
        """The state of a user, which thereby becomes the most recently used.

        Args:
            user: who.
            version: of the weights; states of any other are dropped.
        """
        self._expect(version)
        state = self._states.get(user)
        if state is not None:
            self._states.move_to_end(user)
        return state

    def count(self, *, hit: bool) -> None:
        """Counts a history whose state was, or was not, of use."""
        self.statistics.hits += hit
        self.statistics.misses += not hit

    def put(self, user: Hashable, version: Hashable, state: UserState) -> None:
        """Keeps a state in place of the user's former one; one that is larger than the bound is not kept."""
        self._expect(version)
        former = self._states.pop(user, None)
        if former is not None:
            self._bytes -= former.num_bytes
        if state.num_bytes > self.max_bytes:
            return
        self._states[user] = state
        self._bytes += state.num_bytes
        while self._bytes > self.max_bytes:
            _, oldest = self._states.popitem(last=False)
            self._bytes -= oldest.num_bytes
            self.statistics.evictions += 1

    def clear(self) -> None:
        """Drops every state."""
        self._states.clear()
        self._bytes = 0

    def _expect(self, version: Hashable) -> None:
        if version != self._version:
            self.clear()
            self._version = version
