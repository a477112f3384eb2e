"""How well vocabularies keep up: shared rows, ids that came and went, and how full they are."""

from __future__ import annotations

from dataclasses import fields

import torch

from hstu_dist.distributed.process_group import sum_over_ranks
from hstu_dist.distributed.tables import EmbeddingTables
from hstu_dist.distributed.vocabulary import Usage
from hstu_dist.train.metrics_log import MetricsLog
from hstu_dist.train.step import StepResult
from hstu_dist.train.trainer import Hook, Trainer


class VocabularyHook(Hook):
    """Logs, every few steps and for each table that has one, what its vocabulary did since it last logged."""

    def __init__(self, every_steps: int, tables: EmbeddingTables, log: MetricsLog | None) -> None:
        """Logs to `log`, if this rank does."""
        self.every_steps = every_steps
        self.tables = tables
        self.log = log
        self._steps = 0

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Writes every few steps; rates are per look-up and per step."""
        self._steps += 1
        if trainer.state.step % self.every_steps:
            return
        for table, vocabulary in self.tables.vocabularies.items():
            mine = torch.tensor(vocabulary.usage.take(), device=trainer.world.device)
            total = Usage(**dict(zip([f.name for f in fields(Usage)], sum_over_ranks(mine).tolist(), strict=True)))
            values = {
                "collisions": total.shared / max(1, total.lookups),
                "admitted_per_step": total.admitted / self._steps,
                "evicted_per_step": total.evicted / self._steps,
            }
            occupied = vocabulary.occupied()
            if occupied is not None:
                values["occupied"] = float(occupied.double().mean())
            if self.log is not None:
                self.log.write(trainer.state.step, {f"vocabulary/{table}/{name}": v for name, v in values.items()})
        self._steps = 0
