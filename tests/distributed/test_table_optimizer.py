"""One configuration of a table's optimizer means the same to our kernel and fbgemm's; fp16 rows are rounded fairly."""

from __future__ import annotations

import inspect
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torchrec.distributed.batched_embedding_kernel import EmbeddingFusedOptimizer

from hstu_dist.distributed import torchrec_tables
from hstu_dist.distributed.config import ITEM, EmbeddingConfig, TableOptimizerConfig, TableShape
from hstu_dist.distributed.planner import build_tables
from hstu_dist.distributed.process_group import process_group
from hstu_dist.distributed.row_update import Moment, Rows, row_rule, stochastic_round, update_rows
from hstu_dist.distributed.table_optimizer import fbgemm_arguments, sharder_of
from hstu_dist.distributed.table_plan import configured_plan
from hstu_dist.ops.random import TokenNoise
from tests.distributed.ranks import run_ranks
from tests.distributed.test_tables import state_of, train_step, weights_of

KINDS = ("sgd", "rowwise_adagrad", "adamw", "rowwise_adamw")
SHAPE = TableShape(num_rows=40, width=8)


def optimizer_of(kind: str, **settings: Any) -> TableOptimizerConfig:
    return TableOptimizerConfig(kind=kind, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "rate"), [*zip(KINDS, (0.05, 0.05, 1e-3, 1e-3), strict=True)])
def test_null_is_the_default_of_the_kind(kind: str, rate: float) -> None:
    config = optimizer_of(kind)
    assert config.learning_rate == rate
    assert config.eps == (None if kind == "sgd" else 1e-8)
    assert config.betas == ((0.9, 0.98) if "adamw" in kind else None)
    assert config.weight_decay == (0.0 if "adamw" in kind else None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sgd", "eps": 1e-3}, "eps: got 0.001, expected null: sgd has no eps"),
        ({"kind": "rowwise_adagrad", "betas": (0.9, 0.9)}, "expected null: rowwise_adagrad has no betas"),
        ({"kind": "rowwise_adagrad", "weight_decay": 0.0}, "expected null: rowwise_adagrad has no weight_decay"),
        ({"kind": "adamw", "betas": (0.9, 1.0)}, r"betas: got \(0.9, 1.0\), expected two numbers in \[0, 1\)"),
        ({"kind": "adamw", "weight_decay": -1.0}, "greater than or equal to 0"),
        ({"kind": "adam"}, "Input should be 'sgd'"),
    ],
    ids=str,
)
def test_what_a_kind_does_not_have_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_of(**settings)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_the_plan_is_what_the_kernel_allocates(kind: str, dtype: str) -> None:
    # 41 rows of 52 elements on the fullest of 3 ranks
    config = EmbeddingConfig(dtype=dtype, optimizer=optimizer_of(kind))  # type: ignore[arg-type]
    weight = torch.zeros(41, 52, dtype=torch.float16 if dtype == "fp16" else torch.float32)
    state = row_rule(config.optimizer, width=50).new_state(weight)
    specs = config.specs({ITEM: TableShape(121, 50)})
    held = configured_plan(specs, world_size=3).bytes_per_rank(specs)
    assert max(held) == sum(t.nbytes for t in (weight, *state.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_fbgemm_knows_every_setting(kind: str) -> None:
    arguments = fbgemm_arguments(optimizer_of(kind, learning_rate=0.5))
    known = inspect.signature(SplitTableBatchedEmbeddingBagsCodegen.__init__).parameters
    assert arguments.pop("lr") == 0.5
    assert arguments.keys() <= known.keys()
    assert len(arguments) == {"sgd": 0, "rowwise_adagrad": 1}.get(kind, 4)


def train_with(kind: str, kernel: str) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """Weights, state and fbgemm's step counts after five steps, on the CPU, where fbgemm has two of the optimizers."""

    config = EmbeddingConfig(optimizer=optimizer_of(kind, learning_rate=0.1), init_std=1.0)
    with patch.object(torchrec_tables, "sharder_of", lambda marked, **_: sharder_of(marked, kernel)):
        table = build_tables(config, {ITEM: SHAPE}, torch.device("cpu"), seed=3)
    counts = []
    for step in range(5):
        train_step(table, {ITEM: torch.arange(step, SHAPE.num_rows, 3)}, factor=1.0 / (step + 1))
        for optimizer in table.optimizer.kernels:
            if isinstance(optimizer, EmbeddingFusedOptimizer):
                counts += [int(optimizer._emb_module.iter), int(optimizer._emb_module.iter_cpu)]
        with torch.no_grad():
            # fbgemm counts this lookup, too, and must forget it
            table({ITEM: torch.arange(3)})
    return weights_of(table), state_of(table), counts


def train_both(kind: str) -> list[tuple[Tensor, dict[str, Tensor], list[int]]]:
    with process_group("cpu", 30):
        return [train_with(kind, kernel) for kernel in ("fbgemm", "ours")]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad"])
def test_both_kernels_do_the_same(kind: str) -> None:
    (theirs, their_state, counts), (ours, state, _) = run_ranks(2, train_both, kind)[0]
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-6)
    # a checkpoint of one is a checkpoint of the other
    assert state.keys() == their_state.keys()
    assert all(torch.allclose(state[name], their_state[name], rtol=1e-6) for name in state)
    # fbgemm adds one when it counts, which plain SGD does not
    assert counts == [step + (kind != "sgd") for step in range(5) for _ in range(2)]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_are_updated_as_few(kind: str, stride: int) -> None:
    rule = row_rule(optimizer_of(kind, learning_rate=0.1), width=4)
    # more elements than are updated at a time; every row twice, in no order; with a stride there are rows between
    ids = torch.randperm(40_000) % 20_000 * stride
    gradient = torch.randn(40_000, 4)
    many = torch.randn(20_001 * stride, 4)
    few, state, few_state = many.clone(), rule.new_state(many), rule.new_state(many)
    before = many.clone()
    update_rows(rule, Rows(many, state), (ids, gradient), Moment(0.1, 1))
    # odd places have gaps between them at any stride
    for odd in (0, 1):
        part = ids // stride % 2 == odd
        update_rows(rule, Rows(few, few_state), (ids[part], gradient[part]), Moment(0.1, 1))
    assert torch.equal(many, few)
    assert all(torch.equal(state[name], few_state[name]) for name in state)
    moved = (many != before).any(dim=1).nonzero().squeeze(1)
    assert torch.equal(moved, torch.arange(20_000) * stride)


def test_rounding_at_random_is_fair_and_keeps_what_fits() -> None:
    # a quarter of the way between two numbers, at a large and a small size, below the smallest normal one, and zero
    size = torch.tensor([1000.0, 3.0, 2.0**-13, 2.0**-17, 0.0])
    spacing = torch.tensor([0.5, 2.0**-9, 2.0**-23, 2.0**-24, 0.0])
    values = (size + spacing / 4).expand(40_000, 5)
    for sign in (1, -1):
        words = TokenNoise(7, torch.arange(40_000)).words(5)
        rounded = stochastic_round(sign * values, torch.float16, words).double()
        assert ((rounded == sign * size) | (rounded == sign * (size + spacing))).all()
        up = (rounded != sign * size).double().mean(dim=0)
        assert torch.allclose(up[:4], torch.full((4,), 0.25, dtype=torch.float64), atol=0.01)
    exact = torch.arange(-2048, 2048).half()
    words = TokenNoise(1, torch.arange(4096)).words(1)
    assert torch.equal(stochastic_round(exact.float()[:, None], torch.float16, words)[:, 0], exact)
    beyond = stochastic_round(torch.tensor([[1e6, -1e6]]), torch.float16, words[:1, :1].expand(1, 2))
    assert beyond.tolist() == [[65504.0, -65504.0]]


@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["row_wise", "data_parallel"])
def test_small_updates_of_fp16_rows_do_not_vanish(sharding: str) -> None:
    drifts = {size: run_ranks(size, drift_of, sharding)[0] for size in (1, 2)}
    # 400 steps of 1e-5 each; 1e-5 is a twentieth of the distance between numbers near 0.25
    for drift, row in drifts.values():
        assert drift == pytest.approx(-400 * 1e-5, rel=0.1)
        assert row == drifts[1][1]


def drift_of(sharding: str) -> tuple[float, list[float]]:
    with process_group("cpu", 30) as world:
        config = EmbeddingConfig(
            sharding=sharding,  # type: ignore[arg-type]
            dtype="fp16",
            optimizer=optimizer_of("sgd", learning_rate=1e-5),
        )
        tables = build_tables(config, {ITEM: TableShape(64, 8)}, torch.device("cpu"), seed=3)
        (weight,) = tables.weights().values()
        parts = [s.tensor for s in weight.local_shards()] if hasattr(weight, "local_shards") else [weight]
        for part in parts:
            part.fill_(0.25)
        for _ in range(400):
            tables.optimizer.prepare(1.0)
            rows = tables({ITEM: torch.arange(64)[world.rank :: world.size]})[ITEM]
            assert rows.dtype == torch.float32
            (rows.sum() * world.size).backward()
        after = weights_of(tables).float()
        return float(after.mean() - 0.25), after[5].tolist()
