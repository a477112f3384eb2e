"""TorchRec's planner chooses within the limits of a rank, without any ranks; a run on two uses what it chose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hstu_dist.commands.embedding_table import embedding_table
from hstu_dist.distributed.config import ITEM, EmbeddingConfig, FurtherTableConfig, TableOptimizerConfig, TableShape
from hstu_dist.distributed.planner import build_tables, planned
from hstu_dist.distributed.process_group import process_group
from hstu_dist.distributed.table_plan import EmbeddingPlan, configured_plan, plan_of_settings
from hstu_dist.distributed.tables import check_device
from hstu_dist.errors import UserError
from tests.distributed.ranks import run_ranks

SHAPES = {ITEM: TableShape(1_000_000, 64), "user": TableShape(10_000, 64), "city": TableShape(100, 8)}
SMALL = {ITEM: TableShape(1_000, 16), "user": TableShape(100, 16), "city": TableShape(100, 8)}
# of the item table with row-wise Adagrad
ITEM_BYTES = 1_000_000 * (64 + 1) * 4


def config_of(**changes: Any) -> EmbeddingConfig:
    further = {"user": FurtherTableConfig(sharding="planner"), "city": FurtherTableConfig()}
    return EmbeddingConfig(**{"sharding": "planner", "tables": further, **changes})


def plan_for(config: EmbeddingConfig, ranks: int, memory_bytes: int | None, device: str = "cpu") -> EmbeddingPlan:
    specs = config.specs(SHAPES)
    return planned(configured_plan(specs, ranks), specs, device, memory_bytes)


def test_a_table_larger_than_a_rank_is_split() -> None:
    limit = ITEM_BYTES // 3
    plan = plan_for(config_of(), 4, limit)
    assert plan.tables[ITEM].sharding == "row_wise" and plan.tables["city"].sharding == "data_parallel"
    assert max(plan.bytes_per_rank(config_of().specs(SHAPES))) <= limit
    assert list(plan.tables) == list(SHAPES)


def test_what_it_chose_is_a_plan_that_can_be_loaded_again(tmp_path: Any) -> None:
    for ranks in (1, 2, 4):
        plan = plan_for(config_of(), ranks, None)
        plan.save(tmp_path / "plan.json")
        again = config_of(plan=str(tmp_path / "plan.json"))
        assert plan_of_settings(again, again.specs(SHAPES), ranks) == plan


def test_the_state_of_the_optimizer_counts() -> None:
    # three times the bytes with AdamW's moments
    limit = ITEM_BYTES // 2
    plan_for(config_of(), 4, limit)
    with pytest.raises(UserError, match=r"tables item, user: TorchRec's planner finds no place .* 4 ranks of 0.12 GiB"):
        plan_for(config_of(optimizer=TableOptimizerConfig(kind="adamw")), 4, limit)


def test_kernels_of_host_memory_are_planned_for_gpus() -> None:
    config = config_of(compute_kernel="fused_uvm_caching", tables={})
    specs = config.specs({ITEM: SHAPES[ITEM]})
    plan = planned(configured_plan(specs, 8), specs, "cuda", ITEM_BYTES // 16)
    assert plan.tables[ITEM].compute_kernel == "fused_uvm_caching"
    assert plan.tables[ITEM].cache_load_factor == 0.2


def build_planned() -> tuple[EmbeddingPlan, str, float]:
    with process_group("cpu", 30) as world:
        tables = build_tables(config_of(), SMALL, torch.device("cpu"), seed=1)
        rows = tables({name: torch.arange(world.rank, 90) for name in SMALL})
        total = sum(float(found.double().square().sum()) for found in rows.values())
        return tables.plan, embedding_table(tables.specs, tables.plan), total


@pytest.mark.distributed
def test_ranks_agree_on_the_plan_and_look_up_by_it() -> None:
    (plan, text, total), (other, _, less) = run_ranks(2, build_planned)
    assert plan == other and plan.tables.keys() == SMALL.keys()
    assert "item" in text and plan.tables[ITEM].sharding in text and "rowwise_adagrad" in text and "1,000" in text
    assert total > less > 0


def build_for_cuda(kernel: str, dtype: str) -> str:
    with process_group("cpu", 30):
        try:
            config = EmbeddingConfig(compute_kernel=kernel, dtype=dtype)  # type: ignore[arg-type]
            build_tables(config, {ITEM: TableShape(10, 4)}, torch.device("cpu"), seed=1)
        except UserError as error:
            return str(error)
    return "built"


@pytest.mark.distributed
@pytest.mark.parametrize(("kernel", "dtype"), [("fused_uvm", "fp32"), ("key_value", "fp16"), ("fused", "bf16")])
def test_what_needs_cuda_is_refused_on_the_cpu(kernel: str, dtype: str) -> None:
    (said,) = run_ranks(1, build_for_cuda, kernel, dtype)
    assert said.startswith("embedding table item: ") and "CUDA only" in said and " -> use compute_kernel=fused" in said


def test_rows_on_an_ssd_are_for_plans_only() -> None:
    specs = EmbeddingConfig(compute_kernel="key_value").specs({ITEM: TableShape(10, 4)})
    with pytest.raises(UserError, match=r"table item: compute_kernel: got key_value, whose rows no checkpoint"):
        check_device(specs, torch.device("cuda"))
