"""Memory of a rank: by hand, and against real ranks and towers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.plan_ranks import held, job_of
from hstu_dist.distributed.config import EmbeddingConfig, FurtherTableConfig, ParallelConfig, TableOptimizerConfig
from hstu_dist.distributed.table_plan import configured_plan
from hstu_dist.losses.config import FullSoftmaxConfig
from hstu_dist.models.activations import activation_bytes
from hstu_dist.models.config import HSTUConfig
from hstu_dist.plan.config import PlanConfig
from hstu_dist.plan.job import DRAWS_OF_EVERYTHING, Job
from hstu_dist.plan.memory import host_bytes, memory_of, shortages
from hstu_dist.train import retrieval
from tests.distributed.ranks import run_ranks
from tests.plan.cases import hardware, job

# 8 ranks: 1,000,003 rows, rounded up
ROWS = 125_001
# positions 10 x 50, two blocks of 5 x 50 x 50 weights and 50 biases
DENSE = 500 + 2 * (5 * 2500 + 50)


@pytest.mark.parametrize(("kind", "state"), [("sgd", 0), ("rowwise_adagrad", 1), ("adamw", 104), ("rowwise_adamw", 53)])
def test_table_and_its_optimizer_by_hand(kind: str, state: int) -> None:
    memory = memory_of(job(kind), 8)
    assert memory.table == ROWS * 52 * 4
    assert memory.table_optimizer == ROWS * state * 4
    whole = memory_of(job(kind, "table_wise"), 8)
    assert (whole.table, whole.table_optimizer) == (1_000_003 * 52 * 4, 1_000_003 * state * 4)


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adamw", "rowwise_adamw"])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_the_table_is_what_preflight_counts(kind: str, ranks: int) -> None:
    planned = job(kind)
    memory = memory_of(planned, ranks)
    held = configured_plan(planned.tables, ranks).bytes_per_rank(planned.tables)
    assert memory.table + memory.table_optimizer == max(held)


def with_table(**changes: Any) -> Job:
    """A table of a width that 8 ranks can split."""
    model = HSTUConfig(width=64, num_heads=2, num_layers=2, max_length=10, relative_bias="none")
    optimizer = TableOptimizerConfig(kind="adamw")
    return job(model=model, embedding=EmbeddingConfig(**{"optimizer": optimizer, **changes}))


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "column_wise", "data_parallel", "planner"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_every_kind_of_table_is_what_preflight_counts(sharding: str, dtype: str) -> None:
    further = {"user": FurtherTableConfig(rows=1000, width=6, sharding="table_wise"), "unknown": FurtherTableConfig()}
    planned = with_table(sharding=sharding, dtype=dtype, tables=further)
    assert planned.tables.keys() == {"item", "user"}
    held = configured_plan(planned.tables, 8).bytes_per_rank(planned.tables)
    memory = memory_of(planned, 8)
    # whole tables lie where the last block of rows is smaller: a few bytes less than the fullest rank might have
    assert max(held) <= memory.table + memory.table_optimizer <= 1.0001 * max(held)


def test_an_average_is_one_more_copy_of_all_weights() -> None:
    plain, averaged = memory_of(with_table(), 8), memory_of(replace(with_table(), averaged=True), 8)
    assert averaged.resident - plain.resident == plain.table + plain.dense


def test_tables_of_host_memory_leave_the_chip_and_fill_the_node() -> None:
    fused = with_table()
    weights, state = memory_of(fused, 8).table, memory_of(fused, 8).table_optimizer
    cached = with_table(compute_kernel="fused_uvm_caching", cache_load_factor=0.25)
    assert (memory_of(cached, 8).table, memory_of(cached, 8).table_optimizer) == (int(weights * 0.25), 0)
    assert memory_of(with_table(compute_kernel="fused_uvm"), 8).table == 0
    tower = memory_of(fused, 8).resident - weights - state
    assert host_bytes(with_table(compute_kernel="fused_uvm"), hardware()) == 4 * (tower + 2 * (weights + state))


def test_who_exchanges_what() -> None:
    row, ids = 64 * 4, 20 * 5
    exchanged = {
        sharding: memory_of(with_table(sharding=sharding), 8).communication - ids * (8 + row)
        for sharding in ("row_wise", "table_wise", "column_wise")
    }
    # all ids go to every rank that has columns, and an eighth of every row comes from it
    assert exchanged == {
        "row_wise": ids * (8 + row),
        "table_wise": 8 * ids * (8 + row),
        "column_wise": ids * (8 * 8 + row),
    }
    assert memory_of(with_table(sharding="data_parallel"), 8).communication == 1_000_003 * 65 * 4


def test_the_other_parts_by_hand() -> None:
    memory = memory_of(job(), 8)
    assert (memory.dense, memory.gradients, memory.dense_optimizer) == (DENSE * 4, DENSE * 4, DENSE * 8)
    # 2 sequences of 10 tokens; each has an item, a target and three negatives
    assert memory.activations == activation_bytes(job().model, 20)
    ids = 20 * 5
    assert memory.lookups == ids * (8 + 4 * (52 + 50 + 50)) + 20 * 3 * 50 * 4 + 20 * 3 * 2 * 8
    assert memory.communication == 2 * ids * (8 + 4 * 52)
    # rank 0 answers all eight
    assert memory_of(job(sharding="table_wise"), 8).communication == 9 * ids * (8 + 4 * 52)
    assert memory_of(job(), 1).communication == 0
    assert memory.total == memory.resident + memory.gradients + memory.activations + memory.lookups + (
        memory.communication + memory.workspace
    )


def test_a_step_looks_up_everything_where_the_trainer_would() -> None:
    assert DRAWS_OF_EVERYTHING == retrieval._DRAWS_OF_EVERYTHING
    # 160 tokens x 3 negatives in a step
    assert job(num_items=60).ids_of(8) == 60
    assert job(num_items=61).ids_of(8) == 61
    assert job(num_items=1000).ids_of(8) == 100
    assert job(loss=FullSoftmaxConfig()).ids_of(8) == 1_000_003


def test_host_memory_holds_a_copy_of_what_a_checkpoint_saves() -> None:
    memory = memory_of(job(), 8)
    assert host_bytes(job(), hardware()) == 4 * memory.resident
    whole = memory_of(job(sharding="table_wise"), 8)
    tower = whole.dense + whole.dense_optimizer
    assert host_bytes(job(sharding="table_wise"), hardware()) == whole.resident + 3 * tower


def test_what_does_not_fit_is_named() -> None:
    plan = PlanConfig()
    assert shortages(job(), hardware(), plan) == []
    assert "GB on a rank, 0.9 GB usable" in shortages(job(num_items=10**9), hardware(), plan)[0]
    assert "for a checkpoint" in shortages(job(), hardware(host_memory_gb=0.05), plan)[0]
    assert shortages(job(num_items=7), hardware(), plan) == ["7 rows on 8 ranks"]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kind"), [(1, "rowwise_adagrad"), (2, "adamw"), (4, "rowwise_adamw")])
def test_resident_bytes_are_those_of_real_ranks(ranks: int, kind: str) -> None:
    planned = job_of(kind, 100_001, ranks)
    memory = memory_of(planned, ranks)
    expected = memory.resident + memory.gradients
    measured = run_ranks(ranks, held, kind, 100_001)
    # the last ranks may have a row less
    assert max(rank.tensors for rank in measured) == expected
    assert max(rank.process for rank in measured) == pytest.approx(expected, rel=0.05)


def test_a_split_tower_a_step_in_parts_and_sets_of_tables_by_hand() -> None:
    whole = memory_of(job(), 8)
    split = memory_of(job(parallel=ParallelConfig(kind="fsdp")), 8)
    share = -(-DENSE // 8)
    assert (split.dense, split.gradients, split.dense_optimizer) == (4 * share, 4 * share, 8 * share)
    # weights and gradients of one of two blocks
    assert split.workspace - whole.workspace == 2 * 4 * (DENSE // 2)
    groups = memory_of(job(parallel=ParallelConfig(kind="hsdp", shard_ranks=2), micro_batches=4), 8)
    assert (groups.dense, groups.gradients) == (4 * DENSE // 2, 4 * DENSE)
    # 20 tokens on the fullest rank, 5 at a time
    assert 4 * groups.activations == whole.activations
    sets = memory_of(job(embedding=EmbeddingConfig(replicas=2, optimizer=TableOptimizerConfig(kind="sgd"))), 8)
    assert sets.table == 250_001 * 52 * 4 and sets.dense == whole.dense
