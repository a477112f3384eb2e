"""Whole-corpus evaluation of a recommender, and of popularity beside it, exact across ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.process_group import sum_over_ranks
from hstu_dist.distributed.recommender import Recommender
from hstu_dist.metrics.ranking import Measures, RankingMetrics, ranks_of_targets
from hstu_dist.ops.jagged import last_rows
from hstu_dist.ops.normalize import unit_rows
from hstu_dist.plugins import find
from hstu_dist.train.config import EvaluationConfig


def measures_of(config: EvaluationConfig) -> Measures:
    """What a run measures; imports metrics of the user's own.

    Raises:
        UserError: one cannot be imported.
    """
    return Measures(config.cutoffs, {name: find(target) for name, target in config.metrics.items()})


@torch.no_grad()
def evaluate(recommender: Recommender, batches: Iterable[JaggedBatch], measures: Measures) -> dict[str, float]:
    """Metrics of the item that follows each sequence of all ranks' batches.

    Args:
        recommender: what is evaluated; its mode does not matter, no random numbers are given.
        batches: this rank's share, as many as every rank has; every user is on exactly one rank.
        measures: what is measured of the ranks.

    Returns:
        Means over all users, equal on every rank.
    """
    corpus_VD, listed_V = recommender.corpus(), recommender.listed()
    items_VD = unit_rows(corpus_VD)
    device = items_VD.device
    metrics = RankingMetrics.empty(measures, device)
    for host_batch in batches:
        # also a share without sequences: a sharded tower, and a vocabulary, need all ranks
        batch, known_T = recommender.in_rows(host_batch.to(device))
        vectors_TD = recommender.encode_local(corpus_VD[batch.item_ids], batch)
        if batch.num_sequences == 0:
            continue
        last = last_rows(batch.offsets)
        target, history = batch.target_ids[last], (batch.item_ids, batch.offsets)
        ranks = ranks_of_targets(vectors_TD[last], items_VD, target, history, listed_V)
        # an item without a row of its own cannot be found
        ranks.masked_fill_(~known_T[last], items_VD.shape[0] + 1)
        metrics += RankingMetrics.of_ranks(ranks, measures)
    return RankingMetrics(measures, sum_over_ranks(metrics.sums)).values()


@torch.no_grad()
def evaluate_popularity(counts_V: Tensor, batches: Iterable[JaggedBatch], measures: Measures) -> dict[str, float]:
    """Metrics of ranking all items by how often they occur in training, for every user alike.

    Args:
        counts_V: [num_items] int64.
        batches: this rank's share.
        measures: what is measured of the ranks.
    """
    # one feature: a user's vector is 1, an item's its count
    items_V1 = counts_V.to(torch.float64)[:, None]
    metrics = RankingMetrics.empty(measures, counts_V.device)
    for host_batch in batches:
        batch = host_batch.to(counts_V.device)
        if batch.num_sequences:
            users_B1 = items_V1.new_ones(batch.num_sequences, 1)
            target = batch.target_ids[last_rows(batch.offsets)]
            ranks = ranks_of_targets(users_B1, items_V1, target, (batch.item_ids, batch.offsets))
            metrics += RankingMetrics.of_ranks(ranks, measures)
    return RankingMetrics(measures, sum_over_ranks(metrics.sums)).values()
