"""Runs on the tiny data set that the distributed, checkpoint and trainer tests share; all functions run on a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hstu_dist.commands.session import Session
from hstu_dist.commands.sessions import open_session
from hstu_dist.config import RunConfig, compose
from hstu_dist.data.split import Split
from hstu_dist.distributed.process_group import World
from hstu_dist.train.hooks import AverageHook
from hstu_dist.train.state import TrainState
from hstu_dist.train.step import StepResult, TrainStep
from hstu_dist.train.trainer import Hook, Trainer
from tests.tiny import tiny_overrides


def tiny_config(data: Path, output: Path, *overrides: str) -> RunConfig:
    tiny = tiny_overrides(data, output)
    if "loss=full_softmax" in overrides:
        tiny.remove("loss.num_negatives=8")
    return compose([*tiny, *overrides])


def build(config: RunConfig, world: World) -> Session:
    # TorchRec's planner draws random numbers while it builds: they must not matter
    torch.manual_seed(world.rank)
    return open_session(config, world)


@dataclass
class LossHook(Hook):
    """Loss of every step, over all ranks, exactly as computed."""

    losses: list[float]

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        loss = torch.tensor(result.loss_sum, dtype=torch.float64)
        dist.all_reduce(loss)
        self.losses.append(float(loss) / result.work.tokens)


def trainer_of(session: Session, state: TrainState, epochs: int, hooks: Sequence[Hook] = ()) -> Trainer:
    config = session.config
    averaging = [] if session.average is None else [AverageHook(session.average)]
    return Trainer(
        step=TrainStep(session.objective(), session.optimizers, session.world, config.trainer.micro_batches),
        loader=session.loader(Split.TRAIN),
        state=state,
        epochs=epochs,
        world=session.world,
        hooks=[*averaging, *hooks],
    )


def whole(value: Any, group: dist.ProcessGroup | None = None) -> Tensor:
    """A tensor of `Session.tensors`, gathered on every rank if it is sharded over `group`; None: over all."""
    if isinstance(value, DTensor):
        return value.detach().full_tensor().clone()
    if isinstance(value, Tensor) and not hasattr(value, "local_shards"):
        return value.detach().clone()
    full = torch.zeros(value.size(), dtype=value.dtype)
    for shard in value.local_shards():
        place = tuple(slice(o, o + n) for o, n in zip(shard.metadata.shard_offsets, shard.tensor.shape, strict=True))
        full[place] = shard.tensor
    dist.all_reduce(full, group=group)
    return full


def snapshot(session: Session) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, on every rank alike."""
    names: list[Any] = [None] * session.world.size
    mine = session.tensors()
    dist.all_gather_object(names, {name: tuple(value.size()) for name, value in mine.items()})
    shapes = {name: shape for part in names for name, shape in part.items()}
    gathered = {}
    group = session.recommender.tables.group.sharing
    for name in sorted(shapes):
        if name in mine:
            gathered[name] = whole(mine[name], group)
        else:
            # table-wise: another rank holds it
            gathered[name] = torch.zeros(shapes[name])
            dist.all_reduce(gathered[name], group=group)
    return gathered
