"""A trained ranking model: what a user would do with each candidate, by M-FALCON.

Histories are the interleaved tokens of training: contextual ones, then each event's item and action. A candidate is one
more item, at the time of the request; the heads read its token.

Shapes: B requests, E events, C contextual features, T = B·C + 2·E tokens, M candidates, D width, K heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hstu_dist.inference.batches import Candidates, History, MicroBatch
from hstu_dist.inference.cache import StateCache
from hstu_dist.inference.mfalcon import Encoder, Scorer
from hstu_dist.inference.model import Floats
from hstu_dist.inference.requests import UNKNOWN, Requests
from hstu_dist.losses.config import HeadConfig
from hstu_dist.losses.multi_task import answers_of
from hstu_dist.models.ranking import RankingTower
from hstu_dist.ops.interleave import Interleaving

_ITEM, _ACTION, _CONTEXTUAL = 0, 1, 2
"""First number of a token: what its second one is."""


class RankingModel:
    """A ranking tower and its item table. For one thread."""

    def __init__(
        self, tower: RankingTower, table_VD: Tensor, heads: Sequence[HeadConfig], cache: StateCache | None = None
    ) -> None:
        """A model on the device of its weights.

        Args:
            tower: with weights.
            table_VD: item vectors as they were trained.
            heads: K of them, what the tower predicts.
            cache: where histories are kept between calls.
        """
        self.heads = tuple(heads)
        self.outputs = tuple(f"predicted_{head.name}" for head in heads)
        self.cache = cache
        self.num_contextual = tower.num_contextual
        self.device = table_VD.device
        encoder = Encoder(
            embed=lambda tokens: _embed(tower, table_VD, tokens),
            encode=tower.tower.encode,
            weights=(table_VD, *tower.parameters()),
            max_length=tower.max_length,
            head=tower.heads,
        )
        self.scorer = Scorer(encoder)

    @torch.no_grad()
    def score(self, requests: Requests, micro_batch: int) -> Mapping[str, Floats]:
        """As `Model.score`: of binary heads the probability, of regressions the action itself; NaN if it is unknown.

        A user without events is answered from the contextual features alone.
        """
        history, candidates = self._history(requests), self._candidates(requests)
        predicted_MK = self.scorer.score(history, candidates, MicroBatch(candidates=micro_batch), self.cache).candidates
        answers_MK = answers_of(predicted_MK, self.heads).to(torch.float32).cpu().numpy()
        answers_MK[requests.candidate_ids == UNKNOWN] = np.nan
        return {name: answers_MK[:, place] for place, name in enumerate(self.outputs)}

    def _history(self, requests: Requests) -> History:
        C, B = self.num_contextual, requests.count
        tokens = Interleaving.of(self._tensor(requests.offsets), C)
        first = requests.times.copy()
        filled = np.diff(requests.offsets) > 0
        first[filled] = requests.timestamps[requests.offsets[:-1][filled]]
        events = self._tensor(requests.timestamps)
        times = tokens.merge(self._tensor(first).repeat_interleave(C), events, events)
        codes = np.empty((B, 0), dtype=np.int64) if requests.contextual is None else requests.contextual
        contextual = _tokens(_CONTEXTUAL, self._tensor(codes).flatten())
        items = _tokens(_ITEM, self._tensor(requests.item_ids))
        return History(
            offsets=tokens.offsets,
            tokens=tokens.merge(contextual, items, _tokens(_ACTION, self._tensor(requests.actions))),
            key_times=times,
            # an action is predicted when its item is shown, whenever the next event or the request comes
            query_times=times,
            users=requests.users,
            num_contextual=torch.full((B,), C, device=self.device) if C else None,
        )

    def _candidates(self, requests: Requests) -> Candidates:
        return Candidates(
            offsets=self._tensor(requests.candidate_offsets),
            # an unknown one is computed as any other and has no answer
            tokens=_tokens(_ITEM, self._tensor(requests.candidate_ids).clamp(min=0)),
            times=self._tensor(requests.times),
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        # a copy: what came from a file cannot be written
        return torch.from_numpy(values.astype(np.int64)).to(self.device)


def _tokens(kind: int, numbers: Tensor) -> Tensor:
    """[n, 2] of numbers [n]."""
    return torch.stack([torch.full_like(numbers, kind), numbers], dim=1)


def _embed(tower: RankingTower, table_VD: Tensor, tokens_T2: Tensor) -> Tensor:
    """Vectors [T, D] of tokens, among which the contextual ones of a user are all or none."""
    kinds, numbers = tokens_T2.unbind(dim=1)
    x_TD = table_VD.new_empty(kinds.numel(), table_VD.shape[1])
    for kind, vectors in (
        (_ITEM, lambda ids: table_VD[ids]),
        (_ACTION, tower.features.actions),
        (_CONTEXTUAL, lambda codes: tower.features.context(codes.view(-1, tower.num_contextual)).flatten(0, 1)),
    ):
        rows = (kinds == kind).nonzero().squeeze(1)
        if rows.numel():
            x_TD.index_copy_(0, rows, vectors(numbers[rows]))
    return x_TD
