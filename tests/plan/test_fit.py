"""What does not fit comes with changes that do, and no larger than needed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hstu_dist.distributed.config import ParallelConfig
from hstu_dist.losses.config import SampledSoftmaxConfig
from hstu_dist.plan.config import HardwareConfig, PlanConfig
from hstu_dist.plan.fit import smallest_changes
from hstu_dist.plan.job import Job
from hstu_dist.plan.memory import fits, memory_of
from tests.plan.cases import hardware, job

PLAN = PlanConfig(usable_memory=1.0)


def room_for(wanted: Job, ranks: int = 8) -> HardwareConfig:
    """8 chips on which a job fits exactly as it would on `ranks`."""
    return hardware(chip=replace(hardware().chip, memory_gb=(memory_of(wanted, ranks).total + 1) / 1e9))


def value_of(changes: list[str], key: str) -> int:
    (found,) = (change.partition("=")[2] for change in changes if change.startswith(f"{key}="))
    return int(found)


def test_a_smaller_batch_is_the_largest_that_fits() -> None:
    small = room_for(job(global_batch_size=5 * 8))
    assert value_of(smallest_changes(job(global_batch_size=9 * 8), small, PLAN), "trainer.global_batch_size") == 40


def test_fewer_negatives_are_the_most_that_fit() -> None:
    many = job(loss=SampledSoftmaxConfig(num_negatives=300))
    small = room_for(job(loss=SampledSoftmaxConfig(num_negatives=200)))
    assert value_of(smallest_changes(many, small, PLAN), "loss.num_negatives") == 200


def test_advice_can_be_launched() -> None:
    # 9 sequences a rank do not fit, 8 do: on 12 ranks, if groups of 8 did not ask for 16
    small = room_for(job(global_batch_size=8 * 8))
    grouped = job(global_batch_size=9 * 8, parallel=ParallelConfig(kind="hsdp", shard_ranks=8))
    assert value_of(smallest_changes(grouped, small, PLAN), "cluster.ranks") == 16
    # as small as fits, a share would have fewer sequences than parts
    parts = [replace(job(global_batch_size=n * 8), micro_batches=8) for n in (8, 16)]
    changes = smallest_changes(parts[1], room_for(parts[0]), PLAN)
    assert value_of(changes, "trainer.global_batch_size") == 64
    tiny = room_for(replace(job(global_batch_size=8), micro_batches=1))
    assert not any(change.startswith("trainer.global_batch_size") for change in smallest_changes(parts[1], tiny, PLAN))


def test_more_ranks_are_the_fewest_that_fit() -> None:
    huge = job("adamw", num_items=10**8)
    ranks = value_of(smallest_changes(huge, hardware(), PLAN), "cluster.ranks")
    assert ranks % 4 == 0
    assert fits(huge, hardware(ranks=ranks), PLAN) and not fits(huge, hardware(ranks=ranks - 4), PLAN)


@pytest.mark.parametrize(
    ("wanted", "change"),
    [
        (job("adamw", num_items=20_000_000), "embedding.optimizer.kind=rowwise_adagrad"),
        (job(sharding="table_wise", num_items=20_000_000), "embedding=row_wise"),
    ],
)
def test_optimizer_and_sharding_are_offered_where_they_suffice(wanted: Job, change: str) -> None:
    assert not fits(wanted, hardware(), PLAN)
    assert change in smallest_changes(wanted, hardware(), PLAN)


def test_changes_are_combined_where_none_suffices_alone() -> None:
    # the table fits on one rank with neither optimizer: it must be split, and even then AdamW is too much
    both = job("adamw", "table_wise", num_items=20_000_000)
    assert smallest_changes(both, hardware(), PLAN) == [
        "embedding=row_wise trainer.global_batch_size=8 embedding.optimizer.kind=rowwise_adagrad"
    ]


def test_nothing_is_offered_where_nothing_helps() -> None:
    hopeless = hardware(chip=replace(hardware().chip, memory_gb=1e-4))
    assert smallest_changes(job(), hopeless, PLAN) == []
