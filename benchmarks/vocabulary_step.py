"""What a growing vocabulary costs a step: ids to rows, rows for negatives, lookup and update, against row numbers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from benchmarks.environment import describe
from benchmarks.harness import Effort, clock_of, compare
from hstu_dist.data.synthetic import power_law
from hstu_dist.distributed.config import ITEM, EmbeddingConfig, TableOptimizerConfig, TableShape, VocabularyConfig
from hstu_dist.distributed.planner import build_tables
from hstu_dist.distributed.process_group import process_group
from hstu_dist.report.results import Ratio, Results, Row, write
from hstu_dist.report.tables import ratios_table

NAME = "vocabulary_step"
METRIC = "ids to rows, lookup and update"
STATIC = "static"
KINDS = {
    STATIC: VocabularyConfig(),
    "hash": VocabularyConfig(kind="hash"),
    **{
        f"zch, {eviction}": VocabularyConfig(kind="zch", eviction=eviction)
        for eviction in ("lru", "lfu", "distance_lfu")
    },
}
_INTERVAL = 10
"""Steps between two evictions, the default; all of them are timed together."""

_WIDTH, _IDS, _NEW_IDS = 64, 12_800, 128
_ROWS, _QUICK_ROWS = (10_000, 1_000_000), (2_000,)
_BATCHES = 20
_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)
"""Odd: raw ids of all 64 bits, different for different numbers."""

_CPU = torch.device("cpu")


def run(options: argparse.Namespace) -> int:
    """Measures every kind at every size and writes `vocabulary_step.json`."""
    rows: list[Row] = []
    ratios: list[Ratio] = []
    effort = Effort(budget_seconds=0.1 if options.quick else 15.0, min_rounds=2 if options.quick else 5)
    with process_group("cpu", 60.0):
        for size in _QUICK_ROWS if options.quick else _ROWS:
            label = f"{size:,} rows x {_WIDTH}, {_IDS:,} Zipf ids, {_NEW_IDS / _IDS:.0%} of them new, 1 rank"
            steps = {name: Steps(size, vocabulary) for name, vocabulary in KINDS.items()}
            timings = compare(steps, effort, clock_of(_CPU))
            for name, samples in timings.seconds.items():
                rows.append(samples.map(lambda seconds: seconds / _INTERVAL * 1e3).row(label, name, METRIC, "ms"))
            for name in KINDS:
                if name != STATIC:
                    speed = timings.speed_ratio(name, STATIC).median
                    ratios.append(Ratio(case=label, metric=METRIC, a=name, b=STATIC, value=speed))
    found = Results(
        name=NAME, command=options.command, rows=tuple(rows), ratios=tuple(ratios), **asdict(describe(_CPU))
    )
    path = write(found, options.output)
    sys.stdout.write(f"{ratios_table(found)}\n{path}\n")
    return 0


class Steps:
    """A table in training, its vocabulary full; a call takes as many steps as lie between two evictions."""

    def __init__(self, rows: int, vocabulary: VocabularyConfig) -> None:
        optimizer = TableOptimizerConfig(kind="rowwise_adagrad")
        config = EmbeddingConfig(optimizer=optimizer, vocabulary=vocabulary)
        self.tables = build_tables(config, {ITEM: TableShape(rows, _WIDTH)}, _CPU, seed=1)
        self.vocabulary = self.tables.vocabularies.get(ITEM)
        self.batches = list(_batches(rows))
        self.steps = 0
        if self.vocabulary is not None:
            for part in (torch.arange(rows) * _SPREAD).chunk(_INTERVAL):
                self.vocabulary.find(part, admit=True)

    def __call__(self) -> None:
        """Takes them."""
        for _ in range(_INTERVAL):
            self.tables.optimizer.prepare(1.0)
            rows = self._rows(self.batches[self.steps % _BATCHES])
            self.steps += 1
            self.tables({ITEM: rows.unique()})[ITEM].sum().backward()

    def _rows(self, numbers: Tensor) -> Tensor:
        if self.vocabulary is None:
            return numbers
        ids = numbers * _SPREAD
        # never met before, and not again
        ids[:_NEW_IDS] = torch.arange(_NEW_IDS) + (1 << 40) + self.steps * _NEW_IDS
        rows = self.vocabulary.find(ids, admit=True).rows
        # where negatives are drawn from
        self.vocabulary.occupied_rows()
        return rows


def _batches(rows: int) -> Iterator[Tensor]:
    """Numbers of items [N] of some steps."""
    random = np.random.default_rng(0)
    for _ in range(_BATCHES):
        yield torch.from_numpy(power_law(random.random(_IDS), 1.0, (1, rows)) - 1)
