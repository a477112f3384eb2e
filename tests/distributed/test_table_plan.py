"""Who holds which part of a table: by the settings, from a file, refused where it does not fit this run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hstu_dist.distributed.config import (
    ITEM,
    EmbeddingConfig,
    FurtherTableConfig,
    TableOptimizerConfig,
    TableShape,
    TableSpec,
    VocabularyConfig,
)
from hstu_dist.distributed.table_plan import (
    EmbeddingPlan,
    TableShard,
    configured_plan,
    load_plan,
    plan_of_settings,
)
from hstu_dist.errors import UserError

ADAMW = TableOptimizerConfig(kind="adamw")
SHAPES = {ITEM: TableShape(10, 16), "user": TableShape(8, 6), "city": TableShape(9, 6), "tag": TableShape(3, 5)}


def config_of(**changes: Any) -> EmbeddingConfig:
    tables = {
        "user": FurtherTableConfig(sharding="table_wise"),
        "city": FurtherTableConfig(sharding="table_wise", dtype="fp16"),
    }
    return EmbeddingConfig(**{"optimizer": ADAMW, "tables": tables, **changes})


def specs_of(**changes: Any) -> dict[str, TableSpec]:
    return config_of(**changes).specs(SHAPES)


def places(plan: EmbeddingPlan, table: str) -> list[tuple[int, int, int, int, int]]:
    return [(s.rank, s.row, s.column, s.rows, s.columns) for s in plan.tables[table].shards]


def test_rows_are_split_and_whole_tables_go_where_there_is_room() -> None:
    plan = configured_plan(specs_of(), world_size=4)
    assert places(plan, ITEM) == [(0, 0, 0, 3, 16), (1, 3, 0, 3, 16), (2, 6, 0, 3, 16), (3, 9, 0, 1, 16)]
    # the larger first, to the rank with the fewest bytes; then to the next
    assert places(plan, "user") == [(3, 0, 0, 8, 8)]
    assert places(plan, "city") == [(0, 0, 0, 9, 8)]
    # no settings of its own: small
    assert places(plan, "tag") == [(rank, 0, 0, 3, 8) for rank in range(4)]
    assert plan.tables["city"].dtype == "fp16" and plan.tables["tag"].sharding == "data_parallel"


def test_bytes_of_every_rank_count_every_table() -> None:
    specs = specs_of()
    held = configured_plan(specs, world_size=4).bytes_per_rank(specs)
    growing = specs_of(vocabulary=VocabularyConfig(kind="zch", buckets=2))
    more = configured_plan(growing, world_size=4).bytes_per_rank(growing)
    # keys, what eviction goes by and an index by row are shared; which of the 10 rows are taken is known to all
    assert [b - a for a, b in zip(held, more, strict=True)] == [
        10 * growing[ITEM].config.vocabulary.bytes_per_row // 4 + 50
    ] * 4
    # adamw: two moments of 4 bytes an element beside the weight
    tag, item = 3 * 8 * 12, 16 * 12
    assert held == [3 * item + tag + 9 * 8 * (2 + 8), 3 * item + tag, 3 * item + tag, item + tag + 8 * 8 * 12]


def test_columns_are_split_where_every_part_is_a_multiple_of_four() -> None:
    plan = configured_plan(specs_of(sharding="column_wise"), world_size=4)
    assert places(plan, ITEM) == [(rank, 0, 4 * rank, 10, 4) for rank in range(4)]
    with pytest.raises(UserError, match=r"table item: column_wise cannot split width 16 over 3 ranks -> .* of 12"):
        configured_plan(specs_of(sharding="column_wise"), world_size=3)


def test_further_tables_take_what_they_are_given_and_the_rest_from_the_model() -> None:
    config = config_of(tables={"user": FurtherTableConfig(rows=20, width=4, optimizer=TableOptimizerConfig())})
    specs = config.specs(SHAPES)
    assert specs["user"].shape == TableShape(20, 4) and specs["user"].optimizer.kind == "rowwise_adagrad"
    assert specs["tag"].shape == SHAPES["tag"] and specs["tag"].optimizer == ADAMW
    with pytest.raises(ValueError, match=r"tables.user.rows: got 20, expected at least 21 for its ids"):
        config.specs({**SHAPES, "user": TableShape(21, 4)})


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"sharding": "column_wise"}, "sharding: got column_wise, expected another with rowwise_adagrad"),
        ({"tables": {"a": {"sharding": "column_wise"}}}, "tables.a.sharding: got column_wise"),
        ({"sharding": "data_parallel", "compute_kernel": "fused_uvm"}, "compute_kernel: got fused_uvm, expected fused"),
        ({"cache_load_factor": 0.5}, "cache_load_factor: got 0.5, expected null"),
        ({"tables": {"a.b": {}}}, "tables: got 'a.b', expected a name"),
        ({"tables": {ITEM: {}}}, "tables.item: got a second one"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        EmbeddingConfig(**settings)


def test_a_plan_survives_its_file_and_decides_in_place_of_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan = configured_plan(specs_of(sharding="table_wise"), world_size=3)
    plan.save(file)
    assert load_plan(file) == plan
    specs = specs_of(sharding="row_wise")
    assert plan_of_settings(config_of(plan=str(file)), specs, world_size=3) == plan
    assert plan_of_settings(config_of(), specs, world_size=3) != plan


def changed(plan: EmbeddingPlan, **item: Any) -> dict[str, Any]:
    values = {"world_size": plan.world_size, "tables": {name: vars(table) for name, table in plan.tables.items()}}
    values["tables"][ITEM] = vars(plan.tables[ITEM]) | item  # type: ignore[index]
    return values


def shards(*parts: tuple[int, int, int, int, int]) -> list[TableShard]:
    names = ("rank", "row", "column", "rows", "columns")
    return [TableShard(**dict(zip(names, part, strict=True))) for part in parts]


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"rows": 11}, "item.rows: got 11, expected 10"),
    ({"width": 17}, "item.width: got 17, expected 16"),
    ({"dtype": "fp16"}, "item.dtype: got fp16, expected fp32"),
    ({"compute_kernel": "key_value"}, "item.compute_kernel: got key_value, expected fused"),
    ({"shards": shards((0, 0, 0, 5, 16))}, "item.shards: got no row_wise split of 10 x 16 elements"),
    ({"shards": shards((0, 0, 0, 6, 16), (1, 6, 0, 4, 16))}, "item.shards: got no row_wise split"),
    ({"sharding": "table_wise", "shards": shards((2, 0, 0, 10, 16))}, "item.shards: got no table_wise split"),
    (
        {"sharding": "column_wise", "shards": shards((1, 0, 0, 10, 8), (0, 0, 8, 10, 8))},
        "item.shards: got no column_wise split",
    ),
    ({"sharding": "grid"}, "tables.item.sharding: "),
    ({"pages": 1}, "tables.item.pages: "),
]


@pytest.mark.parametrize(("change", "problem"), MISFITS, ids=[problem for _, problem in MISFITS])
def test_a_plan_that_does_not_fit_is_one_line(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    specs, file = specs_of(), tmp_path / "plan.json"
    values = changed(configured_plan(specs, world_size=2), **change)
    file.write_text(json.dumps(values, default=vars))
    with pytest.raises(UserError) as caught:
        plan_of_settings(config_of(plan=str(file)), specs, world_size=2)
    assert caught.value.problem.startswith(f"embedding.plan {file}: {problem}"), caught.value.problem
    assert caught.value.remedy


def test_a_plan_for_other_ranks_or_tables(tmp_path: Path) -> None:
    specs, file = specs_of(), tmp_path / "plan.json"
    configured_plan(specs, world_size=2).save(file)
    with pytest.raises(UserError, match=r"made for 2 ranks, this run has 3 -> set embedding\.plan=null"):
        plan_of_settings(config_of(plan=str(file)), specs, world_size=3)
    del specs["tag"]
    with pytest.raises(UserError, match="made for tables city, item, tag, user, this run has city, item, user"):
        plan_of_settings(config_of(plan=str(file)), specs, world_size=2)
    configured_plan(config_of(sharding="column_wise", tables={}).specs({ITEM: SHAPES[ITEM]}), 2).save(file)
    rowwise = EmbeddingConfig(plan=str(file))
    with pytest.raises(UserError, match=r"item\.sharding: got column_wise, expected another with rowwise_adagrad"):
        plan_of_settings(rowwise, rowwise.specs({ITEM: SHAPES[ITEM]}), world_size=2)


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), ("{", "no JSON"), ("[]", "")])
def test_a_file_that_is_no_plan(content: str | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=rf"^embedding.plan {file}: .*{reason}"):
        load_plan(file)
