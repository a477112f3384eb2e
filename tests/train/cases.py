"""A trainer on one rank whose step computes nothing, for tests of the loop and its hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hstu_dist.batch import JaggedBatch
from hstu_dist.data.config import LoaderConfig
from hstu_dist.data.loader import BatchLoader
from hstu_dist.data.split import Split
from hstu_dist.distributed.process_group import World
from hstu_dist.models.flops import Workload
from hstu_dist.train.state import TrainState
from hstu_dist.train.step import StepResult
from hstu_dist.train.trainer import Hook, Trainer
from tests.data.cases import dataset_of

WORLD = World(rank=0, size=1, local_size=1, device=torch.device("cpu"))
BATCHES = 3


def idle_trainer(
    hooks: Sequence[Hook] = (),
    state: TrainState | None = None,
    epochs: int = 2,
    step: Callable[[JaggedBatch, Workload, tuple[int, int]], StepResult] | None = None,
) -> Trainer:
    """3 batches an epoch; the loss of every position is 1."""
    config = LoaderConfig(split=Split.TRAIN, global_batch_size=2, max_length=8)

    def idle(batch: JaggedBatch, work: Workload, position: tuple[int, int]) -> StepResult:
        return StepResult(float(work.tokens), work, 0.5)

    loader = BatchLoader(dataset_of([6, 9, 7, 5, 12]), config)
    assert len(loader) == BATCHES
    return Trainer(
        step=step or idle, loader=loader, state=state or TrainState(), epochs=epochs, world=WORLD, hooks=hooks
    )
