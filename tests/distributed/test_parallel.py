"""However the ranks share the tower, and in however many parts they compute a step, they train the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.commands.fitting import restore
from hstu_dist.commands.session import Session
from hstu_dist.data.split import Split
from hstu_dist.distributed.config import ParallelConfig
from hstu_dist.distributed.parallel import DenseSettings, ParallelTower
from hstu_dist.distributed.process_group import process_group
from hstu_dist.errors import UserError
from hstu_dist.train.config import CheckpointConfig
from hstu_dist.train.hooks import AverageHook, CheckpointHook
from hstu_dist.train.state import TrainState
from hstu_dist.train.step import StepResult
from hstu_dist.train.trainer import Hook, Trainer
from tests.distributed.cases import LossHook, build, snapshot, tiny_config, trainer_of
from tests.distributed.ranks import run_ranks

# clipping at a norm that the gradients exceed, and an optimizer that sees their scale
SETTINGS = [
    # 60 users in batches of 19: in the last one of 3 the fourth rank has no share, and no rank four sequences
    "trainer.global_batch_size=19",
    "model.backend=blocked",
    "optimizer.clip_norm=0.02",
    "optimizer.eps=1.0",
    "optimizer.weight_decay=0.1",
    "optimizer.average_decay=0.5",
    "embedding.optimizer.kind=sgd",
    "embedding.optimizer.learning_rate=1.0",
]
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

DDP, FSDP = ["trainer.parallel.kind=ddp"], ["trainer.parallel.kind=fsdp"]
HSDP = ["trainer.parallel={kind: hsdp, shard_ranks: 2}"]
PARTS = ["trainer.micro_batches=4"]
RUNS = {
    "ddp": DDP,
    "ddp parts": [*DDP, *PARTS],
    "fsdp": FSDP,
    "fsdp parts": [*FSDP, *PARTS],
    "hsdp parts": [*HSDP, *PARTS],
    "full_softmax": ["loss=full_softmax"],
    "full_softmax parts": ["loss=full_softmax", *PARTS],
    "sasrec": ["model=sasrec"],
    "sasrec fsdp parts": ["model=sasrec", *FSDP, *PARTS],
}
# a run of the first number of ranks is what the others are compared with
NAMES = {
    1: ["ddp", "full_softmax", "sasrec", "ddp parts"],
    2: ["ddp", "ddp parts", "fsdp", "sasrec fsdp parts"],
    4: ["fsdp parts", "hsdp parts", "full_softmax parts"],
}
WHOLE = [(1, "ddp"), (1, "full_softmax"), (1, "sasrec")]
"""What the others are compared with."""
CASES = [(ranks, name) for ranks, names in NAMES.items() for name in names if (ranks, name) not in WHOLE]
STEPS = 4


class EvaluateHook(Hook):
    """Ranks users, with averaged weights, in the middle of training: that must not change what is trained."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.state.step == 2:
            self.session.evaluate(Split.VALIDATION)


def train_each(data: Path) -> dict[str, Any]:
    """Losses, final state and metrics of each run."""
    found = {}
    with process_group("cpu", 60) as world:
        for name in NAMES[world.size]:
            config = tiny_config(data, Path("unused"), *SETTINGS, *RUNS[name])
            assert config.model.dropout == 0.2 and config.trainer.micro_batches == (4 if "parts" in name else 1)
            session = build(config, world)
            sharded = [isinstance(p, DTensor) for p in session.recommender.tower.parameters()]
            assert all(sharded) if "fsdp" in name or "hsdp" in name else not any(sharded)
            losses: list[float] = []
            average = session.average
            assert average is not None
            trainer_of(session, TrainState(), 1, [LossHook(losses), AverageHook(average), EvaluateHook(session)]).fit()
            found[name] = (losses, snapshot(session), session.evaluate(Split.TEST))
    return found


@pytest.fixture(scope="module")
def runs(tiny_data: Path) -> dict[int, list[dict[str, Any]]]:
    return {ranks: run_ranks(ranks, train_each, tiny_data) for ranks in NAMES}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative to the largest element of each tensor."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-3)) for name in a)


@pytest.mark.parametrize(("world_size", "name"), CASES)
def test_every_way_trains_the_same_model(runs: Any, world_size: int, name: str) -> None:
    first = name.split()[0]
    losses, state, metrics = runs[1][0][first if first in NAMES[1] else "ddp"]
    for rank in runs[world_size]:
        found, found_state, found_metrics = rank[name]
        assert len(found) == len(losses) == STEPS
        # sums in another order, whose rounding grows from step to step
        assert found == pytest.approx(losses, rel=1e-5)
        assert largest_difference(found_state, state) < 5e-5
        assert found_metrics == pytest.approx(metrics, rel=1e-12)


class Whole(torch.nn.Module):
    """A tower whose encoder has no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(8, 8)


def whole_encoder() -> str:
    with process_group("cpu", 60), pytest.raises(UserError) as caught:
        ParallelTower(Whole(), DenseSettings(parallel=ParallelConfig(kind="fsdp")))
    return str(caught.value)


def test_an_encoder_without_layers_is_not_split() -> None:
    for said in run_ranks(2, whole_encoder):
        assert said.startswith("trainer.parallel.kind: got fsdp or hsdp, but Linear has no layers to split")


SOURCES = {"ddp": DDP, "fsdp": FSDP}
# in turn, each writing in place of what it read; at first there is what 2 ranks wrote
CHAIN = {4: {"ddp": FSDP, "fsdp": HSDP}, 3: {"ddp": FSDP, "fsdp": DDP}, 1: {"ddp": DDP, "fsdp": DDP}}
STOP = 3


def save_each(data: Path, folder: Path) -> dict[str, dict[str, Tensor]]:
    """A checkpoint after a few steps by each kind, the sharded one written in the background."""
    found = {}
    with process_group("cpu", 60) as world:
        for name, overrides in SOURCES.items():
            session = build(tiny_config(data, Path("unused"), *SETTINGS, *overrides), world)
            manager = CheckpointManager(folder / name, 9, asynchronous=name == "fsdp")
            trainer = trainer_of(
                session, TrainState(), 1, [CheckpointHook(CheckpointConfig(), manager, session.tensors)]
            )
            trainer.stop_requested = lambda trainer=trainer: trainer.state.step == STOP  # type: ignore[misc]
            trainer.fit()
            found[name] = snapshot(session)
    return found


def load_each(data: Path, folder: Path) -> dict[str, dict[str, Tensor]]:
    """What the kinds of a link of the chain read."""
    found = {}
    with process_group("cpu", 60) as world:
        for source, overrides in CHAIN[world.size].items():
            session = build(tiny_config(data, Path("unused"), *SETTINGS, "seed=9", *overrides), world)
            manager = CheckpointManager(folder / source, 9)
            state = restore(session, manager)
            assert state.step == STOP
            found[source] = snapshot(session)
            manager.save(session.tensors(), state.state_dict(), state.best_step)
    return found


def test_every_kind_loads_what_another_wrote_on_another_number_of_ranks(tiny_data: Path, tmp_path: Path) -> None:
    saved = run_ranks(2, save_each, tiny_data, tmp_path)[0]
    assert any(name.endswith("exp_avg_sq") and value.any() for name, value in saved["fsdp"].items())
    for world_size in CHAIN:
        for rank in run_ranks(world_size, load_each, tiny_data, tmp_path):
            for source, loaded in rank.items():
                assert loaded.keys() == saved[source].keys()
                assert all(torch.equal(loaded[name], saved[source][name]) for name in loaded), (world_size, source)


@pytest.mark.parametrize(
    ("settings", "world_size", "problem"),
    [
        ({"kind": "fsdp"}, 1, "trainer.parallel.kind: got fsdp on 1 rank"),
        ({"kind": "hsdp", "shard_ranks": 2}, 1, "trainer.parallel.kind: got hsdp on 1 rank"),
        ({"kind": "hsdp", "shard_ranks": 4}, 6, "shard_ranks: got 4, expected a divisor of the 6 ranks"),
        ({"kind": "hsdp", "shard_ranks": 4}, 4, "shard_ranks: got 4, expected a divisor of the 4 ranks, and smaller"),
    ],
)
def test_ranks_that_cannot_be_arranged_are_refused(settings: Any, world_size: int, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        ParallelConfig(**settings).check(world_size)
    assert "trainer.parallel.kind=" in caught.value.remedy
    ParallelConfig(**settings).check(8)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("trainer.parallel.shard_ranks=2", "shard_ranks: got 2, expected null: ddp has no groups"),
        ("trainer.parallel.kind=hsdp", "shard_ranks: got None, expected the ranks of a group"),
        ("trainer.parallel.kind=zero3", "trainer.parallel.kind"),
        ("trainer.micro_batches=0", "trainer.micro_batches"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(override: str, problem: str, tiny_data: Path) -> None:
    with pytest.raises(UserError, match=problem):
        tiny_config(tiny_data, Path("unused"), override)
