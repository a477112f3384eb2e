"""The least time of a step, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hstu_dist.distributed.config import EmbeddingConfig, ParallelConfig
from hstu_dist.plan.config import PlanConfig
from hstu_dist.plan.memory import memory_of
from hstu_dist.plan.step_time import step_time
from tests.plan.cases import hardware, job

PLAN = PlanConfig()


def test_computation_by_hand() -> None:
    time = step_time(job(), hardware(), PLAN)
    # two blocks of 5 x 50 x 50 weights; 55 visible pairs a sequence, 2 heads of 25 + 25; 4 scores of width 50
    forward = 16 * (2 * 10 * 2 * 12_500 + 2 * 55 * 2 * 2 * 50 + 2 * 10 * 4 * 50)
    assert time.flops == 3 * forward
    assert time.attention_share == pytest.approx(16 * 2 * 55 * 2 * 2 * 50 / forward)
    assert time.compute == pytest.approx(3 * forward / 8 / 1e12)
    assert time.tokens == 160


def test_a_rank_with_more_sequences_than_the_mean_holds_the_others_up() -> None:
    even, uneven = (step_time(job(global_batch_size=n), hardware(), PLAN) for n in (16, 9))
    assert uneven.compute == even.compute
    assert uneven.mfu(1.0) == pytest.approx(even.mfu(1.0) * 9 / 16)


def test_exchange_by_hand() -> None:
    time = step_time(job(), hardware(), PLAN)
    exchanged = 100 * (8 + 2 * 52 * 4)
    assert time.lookup_bytes == exchanged * 7 // 8
    # half of it leaves the node, over the slower way
    assert time.lookups == pytest.approx(exchanged * 4 / 8 / 1e9)
    gradients = memory_of(job(), 8).gradients
    assert time.reduce_bytes == 2 * gradients * 7 // 8
    # between the nodes, each chip exchanges its quarter; inside them, three quarters go both ways
    assert time.reduce == pytest.approx(max(gradients / 4 / 1e9, 2 * 3 / 4 * gradients / 10e9))


def test_one_rank_exchanges_nothing() -> None:
    time = step_time(job(), hardware(ranks=1, ranks_per_node=1), PLAN)
    assert (time.lookup_bytes, time.reduce_bytes, time.lookups, time.reduce) == (0, 0, 0.0, 0.0)


def test_table_wise_one_rank_answers_all() -> None:
    spread, whole = (step_time(job(sharding=s), hardware(), PLAN) for s in ("row_wise", "table_wise"))
    assert whole.lookups == pytest.approx(8 * spread.lookups)


def test_bounds_and_what_follows_from_them() -> None:
    time = replace(step_time(job(), hardware(), PLAN), compute=3.0, memory=1.0, lookups=1.5, reduce=0.5)
    assert (time.bound, time.serial, time.bounded_by) == (3.0, 5.0, "compute")
    assert replace(time, lookups=4.0).bounded_by == "network" and replace(time, memory=9.0).bounded_by == "memory"
    assert time.tokens_per_day(2.0) == 160 * 43_200
    assert time.mfu(2.0) == pytest.approx(time.flops / (8e12 * 2))


def test_all_parts_of_a_step_move_their_activations() -> None:
    whole, parts = (step_time(job(micro_batches=n), hardware(), PLAN) for n in (1, 2))
    assert memory_of(job(micro_batches=2), 8).activations < memory_of(job(), 8).activations
    assert parts.memory == whole.memory


def test_precision_chooses_the_peak_of_a_known_chip() -> None:
    known = replace(hardware().chip, name="H100 SXM", peak_flops=None)
    seconds = {p: step_time(job(), hardware(chip=known), PlanConfig(precision=p)).compute for p in ("float32", "tf32")}
    assert seconds["float32"] / seconds["tf32"] == pytest.approx(494.5 / 67)


def test_sets_of_tables_keep_look_ups_inside_and_a_split_tower_sends_weights_too() -> None:
    one = step_time(job(), hardware(), PLAN)
    two = step_time(job(embedding=EmbeddingConfig(replicas=2)), hardware(), PLAN)
    # four ranks are one node: nothing of a look-up crosses the network
    assert two.lookups == pytest.approx(two.lookup_bytes / 10e9) and two.lookups < one.lookups / 4
    split = step_time(job(parallel=ParallelConfig(kind="fsdp")), hardware(), PLAN)
    assert split.reduce_bytes == pytest.approx(1.5 * one.reduce_bytes, abs=2) and split.reduce > one.reduce
