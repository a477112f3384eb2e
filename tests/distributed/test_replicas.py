"""Two groups of two ranks that each hold all tables: they train one model, and save it as if there were one set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.commands.session import Session
from hstu_dist.data.split import Split
from hstu_dist.distributed.process_group import process_group
from hstu_dist.distributed.replicas import TableGroup
from hstu_dist.errors import UserError
from hstu_dist.train.config import CheckpointConfig
from hstu_dist.train.hooks import AverageHook, AverageReplicasHook, CheckpointHook
from hstu_dist.train.state import TrainState
from hstu_dist.train.step import StepResult
from hstu_dist.train.trainer import Hook, Trainer
from tests.distributed.cases import LossHook, build, snapshot, tiny_config, trainer_of
from tests.distributed.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SGD = ["embedding.optimizer.kind=sgd", "embedding.optimizer.learning_rate=1.0", "optimizer.eps=1.0"]
ADAMW = [
    "embedding.optimizer.kind=rowwise_adamw",
    "embedding.optimizer.weight_decay=0.1",
    "optimizer.average_decay=0.5",
]
REPLICAS = "embedding.replicas=2"
STOP = 5
SHARDINGS = ("row_wise", "table_wise")


def averaged_half_a_step_apart() -> tuple[Tensor, float]:
    """The mean of fp16 rows of which the second rank's are one step further, in steps from the first one's."""
    with process_group("cpu", 60) as world:
        assert dist.group.WORLD is not None
        rows = torch.full((4000, 2), 0.5 + world.rank * 2**-11, dtype=torch.float16)
        TableGroup(dist.group.WORLD, replicas=dist.group.WORLD)._average(rows)
        steps = (rows.double() - 0.5) * 2**11
        return steps, float(steps.mean())


def test_a_step_of_one_set_of_short_rows_survives_the_mean() -> None:
    (first, mean), (second, _) = run_ranks(2, averaged_half_a_step_apart)
    assert torch.equal(first, second) and set(first.flatten().tolist()) == {0.0, 1.0}
    # 8,000 fair draws
    assert abs(mean - 0.5) < 0.03


def spread(session: Session) -> float:
    """Largest difference between what this rank and the same rank of the other group hold of the tables."""
    largest = 0.0
    for value in session.tensors().values():
        if isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                everyone = [torch.empty_like(shard.tensor) for _ in range(2)]
                dist.all_gather(everyone, shard.tensor, group=session.recommender.tables.group.replicas)
                largest = max(largest, float((everyone[0] - everyone[1]).abs().max()))
    return largest


@dataclass
class SpreadHook(Hook):
    """Writes down how far the sets are apart after each step."""

    session: Session
    spreads: list[float]

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.spreads.append(spread(self.session))


def averaging(session: Session) -> AverageReplicasHook:
    return AverageReplicasHook(session.config.embedding.sync_steps, session.average_replicas)


def train_once(data: Path, overrides: list[str]) -> tuple[list[float], dict[str, Tensor], dict[str, float]]:
    with process_group("cpu", 60) as world:
        session = build(tiny_config(data, Path("unused"), "trainer.global_batch_size=19", *SGD, *overrides), world)
        losses: list[float] = []
        trainer_of(session, TrainState(), 1, [LossHook(losses), averaging(session)]).fit()
        return losses, snapshot(session), session.evaluate(Split.TEST)


def test_averaged_after_every_step_sgd_trains_as_with_one_set(tiny_data: Path) -> None:
    losses, state, metrics = run_ranks(4, train_once, tiny_data, [])[0]
    for found, found_state, found_metrics in run_ranks(4, train_once, tiny_data, [REPLICAS]):
        assert found == pytest.approx(losses, rel=1e-5) and len(found) == 4
        assert found_state.keys() == state.keys()
        for name, value in state.items():
            assert torch.allclose(found_state[name], value, rtol=1e-4, atol=1e-6), name
        assert found_metrics == pytest.approx(metrics, rel=1e-12)


def train_apart(data: Path, folder: Path) -> dict[str, Any]:
    """Spreads up to a stop, which saves, and after it; what was saved; losses of three epochs."""
    found = {}
    with process_group("cpu", 60) as world:
        for sharding in SHARDINGS:
            overrides = [f"embedding={sharding}", "embedding.sync_steps=3", *ADAMW, REPLICAS]
            session = build(tiny_config(data, Path("unused"), *overrides), world)
            assert session.average is not None and spread(session) == 0.0
            manager = CheckpointManager(folder / sharding, 9)
            saving = CheckpointHook(CheckpointConfig(), manager, session.saved_tensors)
            spreads: list[float] = []
            losses: list[float] = []
            hooks = [LossHook(losses), AverageHook(session.average), averaging(session), SpreadHook(session, spreads)]
            trainer = trainer_of(session, TrainState(), 3, [*hooks, saving])
            trainer.stop_requested = lambda trainer=trainer: trainer.state.step == STOP  # type: ignore[misc]
            trainer.fit()
            stopped = (list(spreads), spread(session), snapshot(session))
            trainer.stop_requested, trainer.interrupted = lambda: False, False
            trainer.fit()
            found[sharding] = (*stopped, losses)
    return found


def load(data: Path, folder: Path, overrides: list[str]) -> dict[str, tuple[int, dict[str, Tensor]]]:
    with process_group("cpu", 60) as world:
        found = {}
        for source in SHARDINGS:
            session = build(tiny_config(data, Path("unused"), "seed=9", *ADAMW, *overrides), world)
            manager = CheckpointManager(folder / source, 9)
            state = TrainState()
            state.load_state_dict(manager.load(STOP, session.tensors()))
            found[source] = (state.step, snapshot(session))
        return found


def test_sets_drift_apart_meet_and_restore_anywhere(tiny_data: Path, tmp_path: Path) -> None:
    ranks = run_ranks(4, train_apart, tiny_data, tmp_path)
    for sharding in SHARDINGS:
        # of a table-wise set one rank holds nothing
        apart = [max(rank[sharding][0][step] for rank in ranks) for step in range(STOP)]
        assert [distance > 1e-4 for distance in apart] == [True, True, False, True, True]
        assert apart[2] == 0.0 and all(rank[sharding][1] == 0.0 for rank in ranks)
        losses = ranks[0][sharding][3]
        assert len(losses) == 24 and sum(losses[-8:]) < 0.95 * sum(losses[:8])
    for world_size, overrides in ((4, [REPLICAS]), (2, ["embedding=table_wise"]), (1, [])):
        for rank in run_ranks(world_size, load, tiny_data, tmp_path, overrides):
            for source, (step, loaded) in rank.items():
                saved = ranks[0][source][2]
                assert step == STOP and loaded.keys() == saved.keys()
                assert all(torch.equal(loaded[name], saved[name]) for name in saved), (world_size, source)


@pytest.mark.parametrize(("replicas", "world_size"), [(2, 3), (2, 2), (3, 8), (4, 1)])
def test_groups_that_do_not_come_out_even_are_refused(replicas: int, world_size: int, tiny_data: Path) -> None:
    config = tiny_config(tiny_data, Path("unused"), f"embedding.replicas={replicas}").embedding
    with pytest.raises(UserError, match=f"embedding.replicas: got {replicas}, expected a divisor of the {world_size}"):
        config.check_replicas(world_size)
    config.check_replicas(2 * replicas)
