"""The best hit rates that the synthetic stream allows: of who knows its laws and all but the draws to come."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from hstu_dist.data.appendix_c import (
    AppendixC,
    Draws,
    Floats,
    Ints,
    cumulative_prior,
    distinct,
    event_slots,
    open_limits,
)
from hstu_dist.data.config import AppendixCConfig


def best_hit_rates(config: AppendixCConfig, records: range, cutoffs: Sequence[int]) -> dict[int, float]:
    """HR@K of every event but the first, in expectation, ranked by the true probability of each item.

    Args:
        config: of the stream.
        records: a contiguous part of it.
        cutoffs: K.
    """
    stream, hits = AppendixC(config), dict.fromkeys(cutoffs, 0.0)
    for first in range(0, config.num_records, stream.records_at_once):
        part = range(max(first, records.start), min(first + stream.records_at_once, records.stop))
        if part:
            draws = stream.draws(first // stream.records_at_once, part.stop - first)
            for cutoff, found in _hits(stream, np.array(part), _last(draws, len(part)), cutoffs).items():
                hits[cutoff] += found
    targets = len(records) * (config.record_length - 1)
    return {cutoff: found / targets for cutoff, found in hits.items()}


def _last(draws: Draws, count: int) -> Draws:
    """Those of the last so many records."""
    return Draws(**{field.name: getattr(draws, field.name)[..., -count:] for field in dataclasses.fields(draws)})


def _hits(stream: AppendixC, numbers: Ints, draws: Draws, cutoffs: Sequence[int]) -> dict[int, float]:
    """Sums of the probability that the next item is among the K most probable ones; letters as in `data/appendix_c`."""
    config = stream.config
    B = np.arange(len(numbers))
    open_KB = stream.catalogue.open_items(
        distinct(draws.categories, config.num_categories), open_limits(config, numbers)
    )
    slots_LB, prior_KB = event_slots(config, draws), np.diff(cumulative_prior(config, draws), axis=0, prepend=0.0)
    alpha_B = 1 + (config.max_concentration - 1) * draws.concentration
    seen_KB, hits = np.zeros_like(prior_KB), dict.fromkeys(cutoffs, 0.0)
    for n in range(1, config.record_length):
        np.add.at(seen_KB, (slots_LB[n - 1], B), 1)
        category_KB = (alpha_B * prior_KB + seen_KB) / (alpha_B + n)
        for cutoff in cutoffs:
            hits[cutoff] += float(_in_top(category_KB / open_KB, open_KB, cutoff).sum())
    return hits


def _in_top(item_KB: Floats, open_KB: Ints, cutoff: int) -> Floats:
    """[B] probability of the `cutoff` most probable items, where a category has `open_KB` that are alike."""
    order_KB = np.argsort(-item_KB, axis=0)
    sizes_KB, ranked_KB = (np.take_along_axis(values, order_KB, axis=0) for values in (open_KB, item_KB))
    before_KB = np.cumsum(sizes_KB, axis=0) - sizes_KB
    found: Floats = (np.clip(cutoff - before_KB, 0, sizes_KB) * ranked_KB).sum(axis=0)
    return found
