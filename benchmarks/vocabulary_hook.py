"""Ranks ids, not rows: before each window of a stream its events are predicted among the ids that live then.

Rows are no common ground for vocabularies that make different rows of the same ids; a ranking of rows even flatters a
small table. Here every contender orders the same candidates. Ids of one row tie; ties are broken at random, of which
the expectation is taken. An id that its vocabulary knows to have no row of its own comes last, and is not found.

Shapes: P positions that count, C candidate ids, V rows, D width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.drift import catalogue_of
from hstu_dist.batch import JaggedBatch
from hstu_dist.commands.session import ModelSession
from hstu_dist.data.stream.loader import WindowLoader
from hstu_dist.distributed.process_group import sum_over_ranks
from hstu_dist.ops.normalize import unit_rows
from hstu_dist.train.metrics_log import MetricsLog
from hstu_dist.train.trainer import Hook, Trainer

TARGET = "benchmarks.vocabulary_hook:RankIds"
"""Its name in `trainer.hooks`."""

PREFIX = "ids/"
CUTOFF = 10
_POSITIONS = 1024


class RankIds(Hook):
    """Logs, before each window is trained on, HR@10 among ids and how many ids share a row."""

    def __init__(self, session: ModelSession, log: MetricsLog | None, stream: str) -> None:
        """`stream`: a folder that `benchmarks.drift.play` wrote."""
        self.session = session
        self.log = log
        self.live = torch.from_numpy(np.load(catalogue_of(Path(stream))))

    def before_epoch(self, trainer: Trainer) -> None:
        """Evaluates the window that comes."""
        if trainer.exhausted or trainer.interrupted or trainer.state.batch:
            return
        window = trainer.state.epoch
        assert isinstance(trainer.loader, WindowLoader)
        batches = trainer.loader.evaluation(window, self.session.config.trainer.evaluation.batch_size)
        with trainer.evaluating(), torch.no_grad():
            candidates = Candidates.of(self.session, self.live[window].to(trainer.world.device))
            sums = sum_over_ranks(torch.stack([candidates.sums(batch) for batch in batches]).sum(0))
        if self.log is not None and sums[0]:
            targets, hits, shared = sums.tolist()
            values = {
                "window": float(window),
                "targets": targets,
                f"hr@{CUTOFF}": hits / targets,
                "events on shared rows": shared / targets,
                "ids on shared rows": float(candidates.shares_C.double().mean()),
            }
            self.log.write(trainer.state.step, {f"{PREFIX}{name}": value for name, value in values.items()})


class Candidates:
    """Ids to be ranked, with the rows that stand for them now."""

    def __init__(self, session: ModelSession, rows_C: Tensor, known_C: Tensor) -> None:
        self.recommender = session.retriever
        self.corpus_VD = self.recommender.corpus()
        self.items_VD = unit_rows(self.corpus_VD)
        self.ids_of_row_V = rows_C[known_C].bincount(minlength=self.corpus_VD.shape[0])
        self.shares_C = ~known_C | (self.ids_of_row_V[rows_C] > 1)

    @classmethod
    def of(cls, session: ModelSession, ids_C: Tensor) -> Candidates:
        """Of ids as the data has them; -1: an id that no vocabulary has to know."""
        rows_C, known_C = session.retriever.rows_of(ids_C.clamp(min=0))
        return cls(session, rows_C, known_C & (ids_C >= 0))

    def sums(self, batch: JaggedBatch) -> Tensor:
        """[3] float64: targets that count, expected hits, and targets whose row is not theirs alone."""
        batch, known_T = self.recommender.in_rows(batch.to(self.corpus_VD.device))
        vectors_TD = self.recommender.encode_local(self.corpus_VD[batch.item_ids], batch)
        assert batch.trained is not None
        totals = torch.zeros(3, dtype=torch.float64)
        for positions in batch.trained.nonzero().squeeze(1).split(_POSITIONS):
            target = batch.target_ids[positions]
            hits_P = expected_hits(vectors_TD[positions] @ self.items_VD.T, target, self.ids_of_row_V)
            found_P = known_T[positions] & (self.ids_of_row_V[target] > 0)
            hits_P = hits_P.masked_fill(~found_P, 0)
            shares_P = ~found_P | (self.ids_of_row_V[target] > 1)
            totals += torch.stack([hits_P.new_tensor(len(target)), hits_P.sum(), shares_P.sum()]).cpu()
        return totals


def expected_hits(scores_PV: Tensor, target_P: Tensor, ids_of_row_V: Tensor) -> Tensor:
    """Chance that a target is among the first `CUTOFF` candidates, where equal scores are ordered at random.

    Args:
        scores_PV: of rows.
        target_P: int64 rows of the targets, which are candidates.
        ids_of_row_V: int64, candidates that each row stands for.

    Returns:
        [P] float64; 0 where a score is no number.
    """
    score_P1 = scores_PV.gather(1, target_P[:, None])
    weights_V = ids_of_row_V.double()
    behind_P = (scores_PV < score_P1).double() @ weights_V
    tied_P = (scores_PV == score_P1).double() @ weights_V
    # by what is not behind, so that a score that is no number counts as better
    better_P = weights_V.sum() - behind_P - tied_P
    return ((CUTOFF - better_P) / tied_P.clamp(min=1)).clamp(0, 1)
