"""Vocabularies on real ranks: any ids, the same rows whatever the number of ranks, restored by any other number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.distributed.config import ITEM, EmbeddingConfig, TableOptimizerConfig, TableShape, VocabularyConfig
from hstu_dist.distributed.planner import build_tables
from hstu_dist.distributed.process_group import process_group
from hstu_dist.distributed.tables import EmbeddingTables
from hstu_dist.distributed.torchrec_tables import place_of
from hstu_dist.distributed.vocabulary import GrowingVocabulary, HashedVocabulary
from hstu_dist.distributed.zch import EMPTY
from tests.distributed.cases import whole
from tests.distributed.ranks import run_ranks
from tests.distributed.test_tables import state_of, tensors_of, train_step, weights_of

SHAPE = TableShape(num_rows=50, width=6)
STEPS = 8
"""Of each number of ranks in turn."""


def tables_of(sharding: str = "row_wise", replicas: int = 1, dtype: str = "fp32", **vocabulary: Any) -> EmbeddingTables:
    kind = "adamw" if sharding == "column_wise" else "rowwise_adamw"
    config = EmbeddingConfig(
        sharding=sharding,  # type: ignore[arg-type]
        replicas=replicas,
        dtype=dtype,  # type: ignore[arg-type]
        optimizer=TableOptimizerConfig(kind=kind, learning_rate=0.05),  # type: ignore[arg-type]
        vocabulary=VocabularyConfig(**{"kind": "zch", "buckets": 5, "eviction_interval": 3, **vocabulary}),
    )
    shape = TableShape(SHAPE.num_rows, 16) if sharding == "column_wise" else SHAPE
    return build_tables(config, {ITEM: shape}, torch.device("cpu"), seed=5)


def everyones_ids(step: int) -> Tensor:
    """Beyond 32 bits and negative; new ones come with time."""
    g = torch.Generator().manual_seed(step)
    drawn = torch.randint(60, (24,), generator=g) + 4 * step
    return torch.where(drawn % 2 == 0, drawn + 2**40, -drawn - 2**62)


def step_on(tables: EmbeddingTables, step: int) -> None:
    ids = everyones_ids(step)[dist.get_rank() :: dist.get_world_size()]
    train_step(tables, {ITEM: tables.vocabularies[ITEM].find(ids, admit=True).rows})


def all_tensors(tables: EmbeddingTables) -> dict[str, Any]:
    return {**tensors_of(tables), **{f"vocabulary.{k}": v for k, v in tables.vocabulary_tensors().items()}}


def contents(tables: EmbeddingTables) -> dict[int, tuple[int, list[float]]]:
    """Row and all that it holds, weights and optimizer state, of every id that has one."""
    ids = torch.cat([everyones_ids(step) for step in range(4 * STEPS)]).unique()
    found = tables.vocabularies[ITEM].find(ids, admit=False)
    parts = [weights_of(tables), *(part.reshape(SHAPE.num_rows, -1) for part in state_of(tables).values())]
    content = torch.cat(parts, dim=1)
    return {
        item: (row, content[row].tolist())
        for item, row, known in zip(ids.tolist(), found.rows.tolist(), found.known.tolist(), strict=True)
        if known
    }


def go_on(folder: Path, sharding: str, first: int, buckets: int = 5) -> list[dict[int, tuple[int, list[float]]]]:
    """What was loaded, if anything was, and what `STEPS` further steps made of it, which is saved."""
    with process_group("cpu", 60):
        tables = tables_of(sharding, buckets=buckets)
        manager = CheckpointManager(folder, keep=1)
        manager.load_newest(all_tensors(tables))
        before = contents(tables)
        for step in range(first, first + STEPS):
            step_on(tables, step)
        manager.save(all_tensors(tables), {"step": first + STEPS}, -1)
        return [before, contents(tables)]


def stay(sharding: str, steps: int) -> dict[int, tuple[int, list[float]]]:
    with process_group("cpu", 60):
        tables = tables_of(sharding)
        for step in range(steps):
            step_on(tables, step)
        return contents(tables)


@pytest.mark.distributed
def test_restored_on_1_2_4_3_and_1_ranks_an_id_finds_its_row_as_it_was(tmp_path: Path) -> None:
    written: dict[int, tuple[int, list[float]]] = {}
    for turn, (ranks, sharding) in enumerate(
        [(1, "row_wise"), (2, "row_wise"), (4, "table_wise"), (3, "data_parallel"), (1, "row_wise")]
    ):
        results = run_ranks(ranks, go_on, tmp_path, sharding, turn * STEPS)
        assert all(result[0] == written for result in results)
        written = results[0][1]
    assert len(written) > 20
    alone = run_ranks(1, stay, "row_wise", 5 * STEPS)[0]
    # who has which row does not depend on the ranks; what it holds does in the last bits, by the order of sums
    assert {item: row for item, (row, _) in written.items()} == {item: row for item, (row, _) in alone.items()}
    for item, (_, content) in alone.items():
        assert torch.allclose(torch.tensor(written[item][1]), torch.tensor(content), atol=1e-4)


@pytest.mark.distributed
def test_ranks_without_a_bucket_save_nothing_in_the_place_of_others(tmp_path: Path) -> None:
    written: dict[int, tuple[int, list[float]]] = {}
    for turn, (ranks, sharding) in enumerate([(2, "table_wise"), (3, "row_wise"), (1, "row_wise")]):
        results = run_ranks(ranks, go_on, tmp_path, sharding, turn * STEPS, 1)
        assert all(result[0] == written for result in results)
        written = results[0][1]
    assert len(written) > 20


def rows_that_change_hands(sharding: str, replicas: int, dtype: str) -> tuple[int, float]:
    """How many rows were given to other ids, and the largest trace of what they held before."""
    with process_group("cpu", 60):
        tables = tables_of(sharding, replicas, dtype, eviction_interval=1)
        group = tables.group.sharing
        (name,) = tables.weights()
        initial = whole(tables.weights()[name], group)
        given, trace = 0, 0.0
        for step in range(12):
            ids = everyones_ids(step)[dist.get_rank() :: dist.get_world_size()]
            vocabulary = tables.vocabularies[ITEM]
            assert isinstance(vocabulary, GrowingVocabulary)
            before = whole(vocabulary.state_tensors()["keys"])
            found = vocabulary.find(ids, admit=True)
            changed = (before != whole(vocabulary.state_tensors()["keys"])).nonzero().squeeze(1)
            given += changed.numel()
            state = tables.optimizer.state_tensors()
            held = [whole(value, group) for value in state.values() if value.dim() or hasattr(value, "local_shards")]
            trace = max(
                trace,
                float((whole(tables.weights()[name], group) - initial)[changed].abs().max()),
                *(float(part[changed].abs().max()) for part in held if part.dim() and part.shape[0] == SHAPE.num_rows),
            )
            train_step(tables, {ITEM: found.rows})
        return given, trace


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("sharding", "replicas", "dtype", "ranks"),
    [
        ("row_wise", 1, "fp32", 2),
        ("column_wise", 1, "fp32", 2),
        ("data_parallel", 1, "fp32", 2),
        ("row_wise", 2, "fp32", 4),
        ("row_wise", 1, "fp32", 1),
        ("row_wise", 1, "fp16", 2),
    ],
)
def test_a_row_that_changes_hands_is_as_new(sharding: str, replicas: int, dtype: str, ranks: int) -> None:
    for given, trace in run_ranks(ranks, rows_that_change_hands, sharding, replicas, dtype):
        assert given > 80 and trace == 0.0


def look_twice() -> tuple[bool, list[int], list[bool]]:
    with process_group("cpu", 60) as world:
        tables = tables_of(eviction_interval=1)
        vocabulary = tables.vocabularies[ITEM]
        vocabulary.find(torch.tensor([5, -7])[world.rank :], admit=True)
        before = [whole(value) for value in tables.vocabulary_tensors().values()]
        vocabulary.find(torch.tensor([11, 12, 5]), admit=False)
        after = [whole(value) for value in tables.vocabulary_tensors().values()]
        known = vocabulary.find(torch.tensor([5, 11, -7])[world.rank :], admit=False).known
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        listed = vocabulary.occupied()
        assert listed is not None and int(listed.sum()) == 2
        return same, vocabulary.usage.take(), known.tolist()


def listed_rows_as_a_vocabulary_fills() -> tuple[list[int], int]:
    with process_group("cpu", 60):
        vocabulary = tables_of().vocabularies[ITEM]
        sizes, made = [], 0
        before: Tensor | None = None
        for step in range(30):
            vocabulary.find(everyones_ids(step)[dist.get_rank() :: dist.get_world_size()], admit=True)
            mask, rows = vocabulary.occupied(), vocabulary.occupied_rows()
            assert mask is not None and rows is not None and torch.equal(rows.long(), mask.nonzero().squeeze(1))
            sizes.append(rows.numel())
            made += rows is not before
            before = rows
        vocabulary.state_tensors()["keys"].local_shards()[0].tensor.fill_(EMPTY)
        # as after a checkpoint was loaded: of this rank's rows none is left
        assert vocabulary.occupied_rows().numel() < sizes[-1]  # type: ignore[union-attr]
        return sizes, made


@pytest.mark.distributed
def test_rows_that_stand_for_an_id_are_listed_anew_only_while_there_are_more() -> None:
    for sizes, made in run_ranks(2, listed_rows_as_a_vocabulary_fills):
        assert sizes == sorted(sizes) and sizes[0] == 0 and sizes[-1] == SHAPE.num_rows - 5
        # not in every step, and not for rows that only change hands
        assert made == len(set(sizes)) < 10


@pytest.mark.distributed
def test_an_evaluation_admits_nobody_and_counts_for_nothing() -> None:
    (same, usage, known), (also_same, other_usage, other_known) = run_ranks(2, look_twice)
    assert same and also_same
    assert known == [True, False, True] and other_known == [False, True]
    # look-ups by the rank that made them, ids by the rank that has their bucket
    assert [usage[0], other_usage[0]] == [2, 1] and [a + b for a, b in zip(usage, other_usage, strict=True)][2] == 2


def test_a_hash_takes_any_id_and_counts_who_shares() -> None:
    vocabulary = HashedVocabulary(10)
    ids = torch.tensor([2**62, -5, 7, 7, *range(100, 120)])
    found = vocabulary.find(ids, admit=True)
    assert found.known.all() and int(found.rows.min()) >= 0 and int(found.rows.max()) < 10
    assert torch.equal(found.rows, vocabulary.find(ids, admit=False).rows)
    distinct = {int(i): int(r) for i, r in zip(ids, found.rows, strict=True)}
    rows = list(distinct.values())
    assert vocabulary.usage.take() == [24, sum(rows.count(distinct[int(i)]) > 1 for i in ids), 0, 0]


def _places() -> list[str]:
    with process_group("cpu", 60.0):
        return [place_of(1, kind) for kind in ("cuda", "cpu")]


@pytest.mark.distributed
def test_a_part_on_a_gpu_is_on_that_of_its_rank() -> None:
    assert run_ranks(2, _places) == [["rank:1/cuda:1", "rank:1/cpu"]] * 2
