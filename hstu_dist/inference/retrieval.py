"""A trained retrieval model: scores of candidates, and the best items of the whole corpus.

It scores an item by the cosine of its vector and what the tower gave at the end of the history: what the model was
trained to make large. The output at a candidate would predict what follows the candidate, and is no score of it.

Shapes: B requests, M candidates, V items, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hstu_dist.inference.batches import Candidates, History, MicroBatch
from hstu_dist.inference.cache import StateCache
from hstu_dist.inference.mfalcon import Encoder, Scorer
from hstu_dist.inference.model import Floats
from hstu_dist.inference.requests import UNKNOWN, Ints, Requests
from hstu_dist.models.tower import Tower
from hstu_dist.ops.jagged import sequence_of
from hstu_dist.ops.normalize import unit_rows

_PAIRS = 1 << 24
"""Scores of the corpus held at once."""


@dataclass(frozen=True)
class Best:
    """The best items of each request, best first.

    Attributes:
        ids: [B, k] int64, dense ids; UNKNOWN where there are fewer items than k, or no history to go by.
        scores: [B, k] float32; NaN beside UNKNOWN.
    """

    ids: Ints
    scores: Floats


class Search(Protocol):
    """Finds the items whose vectors are closest to those of users."""

    def search(self, users_BD: Tensor, seen: tuple[Ints, Ints] | None, k: int) -> tuple[Tensor, Tensor]:
        """Ids [B, k] int64 and cosines [B, k] of the best items, without those that are given as seen.

        Args:
            users_BD: [B, D] of length 1.
            seen: dense ids and their offsets [B+1].
            k: items; entries that do not exist are UNKNOWN and -inf.
        """


class ExactSearch:
    """Compares with every item."""

    def __init__(self, items_VD: Tensor) -> None:
        """Of unit vectors [V, D]."""
        self.items_VD = items_VD

    def search(self, users_BD: Tensor, seen: tuple[Ints, Ints] | None, k: int) -> tuple[Tensor, Tensor]:
        """As `Search.search`; of equal cosines any may come first."""
        V = self.items_VD.shape[0]
        step = max(1, _PAIRS // max(1, users_BD.shape[0]))
        best_scores = users_BD.new_empty(users_BD.shape[0], 0)
        best_ids = torch.empty(users_BD.shape[0], 0, dtype=torch.int64, device=users_BD.device)
        rows, ids = _pairs(seen, users_BD.device)
        for start in range(0, V, step):
            stop = min(start + step, V)
            scores = users_BD @ self.items_VD[start:stop].T
            inside = (ids >= start) & (ids < stop)
            scores[rows[inside], ids[inside] - start] = -torch.inf
            here = torch.arange(start, stop, device=ids.device).expand(scores.shape[0], -1)
            joined, joined_ids = torch.cat([best_scores, scores], 1), torch.cat([best_ids, here], 1)
            best_scores, places = joined.topk(min(k, joined.shape[1]), dim=1)
            best_ids = joined_ids.gather(1, places)
        missing = k - best_scores.shape[1]
        best_scores = torch.nn.functional.pad(best_scores, (0, missing), value=-torch.inf)
        best_ids = torch.nn.functional.pad(best_ids, (0, missing), value=UNKNOWN)
        return best_ids.masked_fill(best_scores == -torch.inf, UNKNOWN), best_scores


def _pairs(seen: tuple[Ints, Ints] | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and id of each item that is not wanted."""
    if seen is None:
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        return nothing, nothing
    ids, offsets = (torch.from_numpy(x).to(device) for x in seen)
    return sequence_of(offsets), ids


class RetrievalModel:
    """A tower and its item table. For one thread."""

    outputs = ("scores",)

    def __init__(self, tower: Tower, table_VD: Tensor, max_length: int, cache: StateCache | None = None) -> None:
        """A model on the device of its weights.

        Args:
            tower: with weights.
            table_VD: item vectors as they were trained, of any length.
            max_length: N, positions of the tower.
            cache: where histories are kept between calls.
        """
        self.cache = cache
        self.items_VD = unit_rows(table_VD)
        self.device = table_VD.device
        encoder = Encoder(
            embed=lambda tokens: table_VD[tokens[:, 0]],
            encode=tower,
            weights=(table_VD, *tower.parameters()),
            max_length=max_length,
        )
        self.scorer = Scorer(encoder)

    @torch.no_grad()
    def score(self, requests: Requests, micro_batch: int) -> Mapping[str, Floats]:
        """As `Model.score`: cosines, NaN for an unknown candidate or an empty history."""
        users_BD = self._users(requests)
        owners = np.repeat(np.arange(requests.count), np.diff(requests.candidate_offsets))
        scores = np.empty(len(requests.candidate_ids), dtype=np.float32)
        for start in range(0, len(scores), micro_batch):
            part = slice(start, start + micro_batch)
            ids = torch.from_numpy(requests.candidate_ids[part]).to(self.device)
            rows = torch.from_numpy(owners[part]).to(self.device)
            products = (users_BD[rows] * self.items_VD[ids.clamp(min=0)]).sum(1)
            scores[part] = products.masked_fill(ids == UNKNOWN, torch.nan).cpu().numpy()
        scores[np.diff(requests.offsets)[owners] == 0] = np.nan
        return {"scores": scores}

    @torch.no_grad()
    def retrieve(self, requests: Requests, k: int, exclude_seen: bool, search: Search | None = None) -> Best:
        """The best items for each history.

        Args:
            requests: as in `score`; candidates do not matter.
            k: items for each.
            exclude_seen: leave out the items of the history, also of what the model does not read of it.
            search: how; None: exactly.
        """
        seen = requests.seen if exclude_seen else None
        found = (search or ExactSearch(self.items_VD)).search(self._users(requests), seen, k)
        ids, scores = (x.cpu().numpy() for x in found)
        nothing = (np.diff(requests.offsets) == 0)[:, None] | (ids == UNKNOWN)
        return Best(np.where(nothing, UNKNOWN, ids), np.where(nothing, np.float32(np.nan), scores))

    def _users(self, requests: Requests) -> Tensor:
        """[B, D], what the tower gives at the end of each history; zeros for an empty one."""
        history = history_of(requests, self.device)
        nothing = torch.zeros(requests.count + 1, dtype=torch.int64, device=self.device)
        none = Candidates(offsets=nothing, tokens=history.tokens[:0], times=nothing[1:])
        return self.scorer.score(history, none, MicroBatch(), self.cache).last


def history_of(requests: Requests, device: torch.device) -> History:
    """Histories whose tokens are items: each predicts at the time of the next event, the last one at the request's."""
    query_times = np.append(requests.timestamps[1:], 0)[: len(requests.timestamps)]
    filled = np.diff(requests.offsets) > 0
    query_times[requests.offsets[1:][filled] - 1] = requests.times[filled]

    def tensor(values: Ints) -> Tensor:
        # a copy: what came from a file cannot be written
        return torch.from_numpy(values.copy()).to(device)

    return History(
        offsets=tensor(requests.offsets),
        tokens=tensor(requests.item_ids)[:, None],
        key_times=tensor(requests.timestamps),
        query_times=tensor(query_times),
        users=requests.users,
    )
