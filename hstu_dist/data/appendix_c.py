"""The synthetic stream of arXiv 2402.17152, Appendix C: records whose categories reinforce themselves, over new items.

Letters: B records made at once, L events of a record, K the most categories of a record. A record has slots, one for
each of its categories; events are drawn as slots, and items of a slot's category.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hstu_dist.data.config import AppendixCConfig
from hstu_dist.data.writer import EVENTS_PER_ROW_GROUP, write_pieces

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_FIRST_SECOND = 1_500_000_000
_RECORDS, _EVENTS, _ITEMS = range(3)
"""Streams of random numbers."""


@dataclass(frozen=True)
class Catalogue:
    """Which items each category has, in order of category, then id.

    Attributes:
        members: [num_items] int64 item ids.
        keys: [num_items] int64, category * num_items + id of each, ascending.
        starts: [num_categories] int64, place of each category's first.
    """

    members: Ints
    keys: Ints
    starts: Ints

    @classmethod
    def of(cls, categories: Ints, num_categories: int) -> Catalogue:
        """From the category [num_items] of each item."""
        keys = np.sort(categories * len(categories) + np.arange(len(categories)))
        starts = np.searchsorted(keys, np.arange(num_categories) * len(categories))
        return cls(keys % len(categories), keys, starts)

    def open_items(self, categories: Ints, limits: Ints) -> Ints:
        """How many items of each category have ids below a limit; both broadcast together."""
        found: Ints = np.searchsorted(self.keys, categories * len(self.members) + limits) - self.starts[categories]
        return found


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Uniform numbers in [0, 1) that B records are made of, all of them used.

    Attributes:
        categories: [K, B], which categories a record has.
        priors: [K, B], their weights.
        count: [B], how many they are.
        concentration: [B], alpha.
        source: [L, B], whether an event draws from the prior or repeats the category of an earlier one.
        choice: [L, B], which category of the prior, or which earlier event.
        item: [L, B], which open item of the category.
    """

    categories: Floats
    priors: Floats
    count: Floats
    concentration: Floats
    source: Floats
    choice: Floats
    item: Floats


class AppendixC:
    """The stream as a source of finished sequences, one a record, in order."""

    def __init__(self, config: AppendixCConfig) -> None:
        self.config = config
        self.catalogue = Catalogue.of(item_categories(config), config.num_categories)

    def fingerprint(self) -> dict[str, str]:
        """No inputs: the settings say everything."""
        return {}

    def write(self, folder: Path) -> None:
        """Vocabularies, Parquet and flat columns, piece by piece; memory does not grow with the stream."""
        config = self.config
        lengths = np.full(config.num_records, config.record_length, dtype=np.int64)
        vocabularies = pa.array(np.arange(config.num_records)), pa.array(np.arange(config.num_items))
        write_pieces(folder, vocabularies, lengths, self.pieces())

    def pieces(self) -> Iterator[tuple[Ints, Mapping[str, npt.NDArray[Any]]]]:
        """Lengths and columns of runs of consecutive records.

        The stream has no times; an event's second is the number of its record, so that a split by time keeps the order.
        """
        config = self.config
        length, many = config.record_length, self.records_at_once
        for first in range(0, config.num_records, many):
            records = np.arange(first, min(first + many, config.num_records))
            # drawn in full, so that a stream that ends earlier begins alike
            items_BL = self.records(records, self.draws(first // many, len(records)))
            yield (
                np.full(len(records), length, dtype=np.int64),
                {
                    "item_ids": items_BL.reshape(-1),
                    "timestamps": np.repeat(_FIRST_SECOND + records, length),
                    "actions": np.zeros(items_BL.size, dtype=np.int32),
                },
            )

    @property
    def records_at_once(self) -> int:
        """B; a function of the record length only, because random numbers are drawn by piece."""
        return max(1, EVENTS_PER_ROW_GROUP // self.config.record_length)

    def draws(self, piece: int, records: int) -> Draws:
        """Random numbers of the first `records` records of a piece."""
        K, L, B = self.config.max_categories, self.config.record_length, self.records_at_once
        of_records = uniform((self.config.seed, _RECORDS, piece), (2 * K + 2, B))[:, :records]
        of_events = uniform((self.config.seed, _EVENTS, piece), (3, L, B))[:, :, :records]
        return Draws(
            categories=of_records[:K],
            priors=of_records[K : 2 * K],
            count=of_records[2 * K],
            concentration=of_records[2 * K + 1],
            source=of_events[0],
            choice=of_events[1],
            item=of_events[2],
        )

    def records(self, numbers: Ints, draws: Draws) -> Ints:
        """Items [B, L] of records.

        Args:
            numbers: [B] which records of the stream they are.
            draws: what decides.
        """
        config = self.config
        B = np.arange(len(numbers))
        chosen_KB = distinct(draws.categories, config.num_categories)
        open_KB = self.catalogue.open_items(chosen_KB, open_limits(config, numbers))
        slots_LB = event_slots(config, draws)
        # flat indices: twice as fast as pairs of them
        places = slots_LB * len(B) + B
        counts, starts = open_KB.reshape(-1)[places], self.catalogue.starts[chosen_KB].reshape(-1)[places]
        items_LB = self.catalogue.members[starts + (draws.item * counts).astype(np.int64)]
        items: Ints = np.ascontiguousarray(items_LB.T)
        return items


def item_categories(config: AppendixCConfig) -> Ints:
    """[num_items] int64, the category of each item.

    Of every run of num_categories ids each category gets one (`even`), or of the first run only, so that every category
    has an item from the start, and then any at random, all alike (`random`) or by shares of their own (`simplex`).
    """
    C, V = config.num_categories, config.num_items
    runs = -(-V // C)
    keys = uniform((config.seed, _ITEMS, 0), (runs, C))
    found: Ints = np.argsort(keys, axis=1, kind="stable")
    if config.item_law == "random":
        found[1:] = (keys[1:] * C).astype(np.int64)
    elif config.item_law == "simplex":
        shares = np.cumsum(-np.log1p(-uniform((config.seed, _ITEMS, 1), (C,))))
        found[1:] = np.searchsorted(shares[:-1] / shares[-1], keys[1:], side="right")
    return found.reshape(-1)[:V]


def open_limits(config: AppendixCConfig, numbers: Ints) -> Ints:
    """[B] int64: ids below exist at these records, a share that grows linearly to 1."""
    share = config.open_share + (1 - config.open_share) * (numbers / config.num_records)
    return np.minimum(np.ceil(share * config.num_items).astype(np.int64), config.num_items)


def distinct(uniform_KB: Floats, choices: int) -> Ints:
    """[K, B] int64 in [0, choices), no two of a column alike, all sets of them equally likely."""
    K, B = uniform_KB.shape
    found = np.empty((K, B), dtype=np.int64)
    for k in range(K):
        value = (uniform_KB[k] * (choices - k)).astype(np.int64)
        # the value-th number that is not among the first k
        for taken in np.sort(found[:k], axis=0):
            value += value >= taken
        found[k] = value
    return found


def event_slots(config: AppendixCConfig, draws: Draws) -> Ints:
    """[L, B] int64, the slot of every event."""
    L, B = draws.source.shape
    prior_KB = cumulative_prior(config, draws)
    alpha_B = 1 + (config.max_concentration - 1) * draws.concentration
    slots = np.zeros((L, B), dtype=np.int64)
    for bound_B in prior_KB[:-1]:
        slots += draws.choice >= bound_B
    fresh = draws.source < alpha_B / (alpha_B + np.arange(L)[:, None])
    flat, columns = slots.reshape(-1), np.arange(B)
    for event in range(1, L):
        # an earlier event at random is a category in proportion to how often it occurred
        earlier = (draws.choice[event] * event).astype(np.int64)
        slots[event] = np.where(fresh[event], slots[event], flat[earlier * B + columns])
    return slots


def cumulative_prior(config: AppendixCConfig, draws: Draws) -> Floats:
    """[K, B] float64, H_c summed up over the slots; 1 from the last category of a record on."""
    K = config.max_categories
    weights = np.ones_like(draws.priors) if config.prior == "even" else -np.log1p(-draws.priors)
    if config.count_law == "uniform":
        weights = np.where(np.arange(K)[:, None] <= (draws.count * K).astype(np.int64), weights, 0.0)
    sums = np.cumsum(weights, axis=0)
    found: Floats = np.where(sums >= sums[-1], 1.0, sums / sums[-1])
    return found


def uniform(key: tuple[int, ...], shape: tuple[int, ...]) -> Floats:
    """Numbers in [0, 1), from raw bits: the methods of NumPy's generators may change between versions."""
    bits = np.random.Philox(np.random.SeedSequence(list(key))).random_raw(int(np.prod(shape)))
    return ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)
