"""Test, then train: each event of a window is predicted from what came before it, by a model that never saw the window.

Before each window the ranks wait for it together; rank 0 alone follows the stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from hstu_dist.batch import JaggedBatch
from hstu_dist.data.stream.archive import Archive, Window
from hstu_dist.data.stream.follower import Follower, Progress
from hstu_dist.data.stream.loader import WindowLoader
from hstu_dist.data.stream.pipeline import moment
from hstu_dist.data.stream.popularity import Popularity
from hstu_dist.distributed.process_group import World, sum_over_ranks
from hstu_dist.distributed.recommender import Recommender
from hstu_dist.errors import UserError
from hstu_dist.metrics.ranking import Measures, RankingMetrics, ranks_of_targets
from hstu_dist.ops.jagged import sequence_of
from hstu_dist.ops.normalize import unit_rows
from hstu_dist.train.config import EvaluationConfig
from hstu_dist.train.evaluate import measures_of
from hstu_dist.train.metrics_log import MetricsLog
from hstu_dist.train.trainer import Hook, Trainer

_POLL_SECONDS = 0.5
"""How long the ranks wait for a window before they agree again whether to go on; far below any collective's timeout."""
_POSITIONS = 2048
"""Positions ranked at once: what they have seen is listed for each of them."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feed:
    """Where a rank's windows come from.

    Attributes:
        loader: reads windows that were made.
        follower: makes them; None on all ranks but the main one.
    """

    loader: WindowLoader
    follower: Follower | None


class PrequentialHook(Hook):
    """Waits for each window, and evaluates on it before it is trained on."""

    def __init__(
        self,
        feed: Feed,
        recommender: Recommender,
        averaged: Callable[[], AbstractContextManager[None]],
        config: EvaluationConfig,
        log: MetricsLog | None,
    ) -> None:
        """Inside `averaged()` the model has the weights to be evaluated."""
        self.feed = feed
        self.recommender = recommender
        self.averaged = averaged
        self.config = config
        self.measures = measures_of(config)
        self.log = log

    def before_epoch(self, trainer: Trainer) -> None:
        """Ends the loop if the stream has ended or somebody asks to stop."""
        with trainer.evaluating():
            window = self._next(trainer)
            # a window that was begun was evaluated before
            if window is None or trainer.state.batch:
                return
            batches = self.feed.loader.evaluation(window.number, self.config.batch_size)
            with self.averaged():
                found = evaluate_window(self.recommender, batches, window.popularity, self.measures)
        if trainer.world.is_main:
            self._report(trainer.state.step, window, found)

    def _next(self, trainer: Trainer) -> Window | None:
        number = trainer.state.epoch
        while True:
            progress = self._progress(number)
            mine = torch.tensor([int(trainer.stop_requested())], device=trainer.world.device)
            if int(sum_over_ranks(mine)):
                trainer.interrupted = True
                return None
            if progress is Progress.READY:
                return self.feed.loader.open(number)
            if progress is Progress.ENDED:
                trainer.exhausted = True
                return None

    def _progress(self, number: int) -> Progress:
        """What rank 0 sees, on every rank.

        Raises:
            UserError: on every rank, the stream cannot go on.
        """
        seen: list[Progress | UserError | None] = [None]
        if self.feed.follower is not None:
            try:
                seen = [self.feed.follower.poll(number, _POLL_SECONDS)]
            except UserError as error:
                seen = [error]
        dist.broadcast_object_list(seen)
        (outcome,) = seen
        if isinstance(outcome, UserError):
            raise outcome
        assert outcome is not None
        return outcome

    def _report(self, step: int, window: Window, found: dict[str, dict[str, float]]) -> None:
        facts = {name: float(value) for name, value in window.facts.items()}
        values = {f"prequential/{name}": value for name, value in {"window": float(window.number), **facts}.items()}
        for contender, metrics in found.items():
            values |= {f"prequential/{contender}/{name}": value for name, value in metrics.items()}
        if self.log is not None:
            self.log.write(step, values)
        monitor = self.config.monitor
        shown = ", ".join(f"{name} {metrics[monitor]:.4f}" for name, metrics in found.items()) or "nothing to predict"
        with tqdm.external_write_mode():
            logger.info(
                "window %d, %s: %d events, %s: %s",
                window.number,
                moment(window.facts["start"]),
                window.facts["events"],
                monitor,
                shown,
            )


class RetentionHook(Hook):
    """Removes windows that no checkpoint can come back to; after the hook that saves."""

    def __init__(self, archive: Archive, world: World, oldest_epoch: Callable[[], int]) -> None:
        """`oldest_epoch`: epochs finished in the oldest checkpoint that a run might go on from."""
        self.archive = archive
        self.world = world
        self.oldest_epoch = oldest_epoch

    def after_epoch(self, trainer: Trainer) -> None:
        """Removes them, on rank 0."""
        if self.world.is_main:
            self.archive.remove_before(self.oldest_epoch())


@torch.no_grad()
def evaluate_window(
    recommender: Recommender, batches: Iterable[JaggedBatch], popularity: Popularity, measures: Measures
) -> dict[str, dict[str, float]]:
    """Ranks the target of every position that counts among all items but those before it in its sequence.

    Args:
        recommender: the model.
        batches: this rank's share of the window's examples, as many as every rank has.
        popularity: events of items before the window.
        measures: what is measured of the ranks.

    Returns:
        `model` and `popularity` → metric → mean over positions of all ranks, and `targets`, their number; empty if
        there is none.
    """
    corpus_VD, listed_V = recommender.corpus(), recommender.listed()
    device = corpus_VD.device
    # one feature: a user's vector is 1, an item's its count
    counts_V1 = _counts(recommender, popularity, corpus_VD)[:, None]
    tables = {"model": unit_rows(corpus_VD), "popularity": counts_V1}
    sums = {name: RankingMetrics.empty(measures, device) for name in tables}
    for host_batch in batches:
        # also a share without sequences: a sharded tower, and a vocabulary, need all ranks
        batch, known_T = recommender.in_rows(host_batch.to(device))
        vectors_TD = recommender.encode_local(corpus_VD[batch.item_ids], batch)
        users = {"model": vectors_TD, "popularity": vectors_TD.new_ones(batch.num_tokens, 1)}
        for rows in _counted(batch):
            history = _prefixes(batch, rows)
            for name, items in tables.items():
                ranks = ranks_of_targets(users[name][rows], items, batch.target_ids[rows], history, listed_V)
                # an item without a row of its own cannot be found
                ranks.masked_fill_(~known_T[rows], corpus_VD.shape[0] + 1)
                sums[name] += RankingMetrics.of_ranks(ranks, measures)
    totals = {name: RankingMetrics(measures, sum_over_ranks(metrics.sums)) for name, metrics in sums.items()}
    return {name: {**total.values(), "targets": total.num_users} for name, total in totals.items() if total.num_users}


def _counts(recommender: Recommender, popularity: Popularity, like_VD: Tensor) -> Tensor:
    """Events of the items of each row, [V] float32."""
    events = torch.tensor(popularity.events, device=like_VD.device)
    ids = torch.arange(events.numel()) if popularity.ids is None else torch.tensor(popularity.ids)
    rows, known = recommender.rows_of(ids.to(events.device))
    counts = like_VD.new_zeros(like_VD.shape[0], dtype=torch.float32)
    return counts.index_add_(0, rows[known], events[known].float())


def _counted(batch: JaggedBatch) -> Iterator[Tensor]:
    """Positions that count, a few at a time."""
    assert batch.trained is not None
    yield from batch.trained.nonzero().squeeze(1).split(_POSITIONS)


def _prefixes(batch: JaggedBatch, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Items of each row's sequence up to the row itself, end to end, and where each row's begin; [*], [n+1] int64."""
    starts = batch.offsets[sequence_of(batch.offsets)[rows]]
    lengths = rows + 1 - starts
    offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    total = int(offsets[-1])
    places = torch.arange(total, device=rows.device) + (starts - offsets[:-1]).repeat_interleave(
        lengths, output_size=total
    )
    return batch.item_ids[places], offsets
