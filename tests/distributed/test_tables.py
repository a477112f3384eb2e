"""The sharded item table equals one float64 nn.Embedding, and starts the same however many ranks hold it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hstu_dist.distributed.config import EmbeddingConfig, TableOptimizerConfig
from hstu_dist.distributed.process_group import process_group
from hstu_dist.distributed.tables import ItemTable, TableShape
from tests.distributed.cases import whole
from tests.distributed.ranks import run_ranks

# rows that no number of ranks divides; a width that is padded to 8 in the table
SHAPE = TableShape(num_rows=97, width=6)
STORED_WIDTH = 8
STEPS = 20
LEARNING_RATE = 0.1
LAYOUTS = list(product(("row_wise", "table_wise"), ("rowwise_adagrad", "sgd")))
# weights are of order 1; rounding of each of 20 updates to fp32 leaves 2.5e-7
TOLERANCE = 2e-6


def config_of(sharding: str, optimizer: str) -> EmbeddingConfig:
    table_optimizer = TableOptimizerConfig(kind=optimizer, learning_rate=LEARNING_RATE)  # type: ignore[arg-type]
    return EmbeddingConfig(sharding=sharding, init_std=1.0, optimizer=table_optimizer)  # type: ignore[arg-type]


def ids_of(step: int, rank: int, world_size: int) -> Tensor:
    """A rank's ids: repeated within a rank and between ranks; some ranks have none, in step 7 none has any."""
    g = torch.Generator().manual_seed(step)
    everyone = torch.randint(SHAPE.num_rows, (0 if step == 7 else 12,), generator=g)
    if step % 3 == 1:
        # all on the last rank
        return everyone if rank == world_size - 1 else everyone[:0]
    return everyone[rank::world_size]


def learning_rate(step: int) -> float:
    return LEARNING_RATE * (0.5 if step >= STEPS // 2 else 1.0)


def pull(rows: Tensor, ids: Tensor) -> Tensor:
    """A loss whose gradient depends on the weights: each row is drawn towards a vector of its own."""
    columns = torch.arange(rows.shape[1], dtype=rows.dtype)
    goal = torch.sin(ids[:, None] + columns).to(rows.dtype)
    return 0.5 * ((rows - goal) ** 2).sum()


def train_table(sharding: str, optimizer: str, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Weights before and after, on every rank."""
    table = ItemTable(SHAPE, config_of(sharding, optimizer), torch.device("cpu"), seed=5)
    (weight,) = table.sharded.state_dict().values()
    before = whole(weight)
    for step in range(STEPS):
        for group in table.fused_optimizer.param_groups:
            group["lr"] = learning_rate(step)
        table.fused_optimizer.step()
        ids = ids_of(step, rank, world_size)
        rows = table(ids)
        assert rows.shape == (ids.numel(), SHAPE.width)
        # TorchRec averages gradients over ranks
        (pull(rows, ids) * world_size).backward()
    return before, whole(weight)


def train_all_tables() -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    with process_group("cpu", 60) as world:
        return {layout: train_table(*layout, world.rank, world.size) for layout in LAYOUTS}


def train_embedding(before: Tensor, optimizer: str) -> Tensor:
    """One process, float64, optimizer written out."""
    embedding = nn.Embedding.from_pretrained(before.double(), freeze=False)
    accumulator = torch.zeros(SHAPE.num_rows, 1, dtype=torch.float64)
    for step in range(STEPS):
        ids = ids_of(step, 0, 1)
        embedding.zero_grad()
        pull(embedding(ids)[:, : SHAPE.width], ids).backward()
        assert embedding.weight.grad is not None
        gradient = embedding.weight.grad
        scale = torch.ones_like(accumulator)
        if optimizer == "rowwise_adagrad":
            # fbgemm's mean is over the stored width, padding included
            accumulator += (gradient**2).mean(dim=1, keepdim=True)
            scale = 1 / (accumulator.sqrt() + 1e-8)
        with torch.no_grad():
            embedding.weight -= learning_rate(step) * scale * gradient
    return embedding.weight.detach()


@pytest.fixture(scope="module")
def trained() -> dict[int, dict[tuple[str, str], tuple[Tensor, Tensor]]]:
    return {size: run_ranks(size, train_all_tables)[0] for size in (1, 2, 4)}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("sharding", "optimizer"), LAYOUTS)
def test_equals_one_float64_embedding(trained: Any, world_size: int, sharding: str, optimizer: str) -> None:
    before, after = trained[world_size][sharding, optimizer]
    expected = train_embedding(before, optimizer)
    assert before.shape == (SHAPE.num_rows, STORED_WIDTH)
    moved = (after != before)[:, : SHAPE.width].all(dim=1)
    used = torch.cat([ids_of(step, 0, 1) for step in range(STEPS)]).unique()
    assert moved.nonzero().squeeze(1).tolist() == used.tolist()
    assert (after - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert torch.equal(after[:, SHAPE.width :], before[:, SHAPE.width :])


def test_initial_weights_do_not_depend_on_the_ranks(trained: Any) -> None:
    first, _ = trained[1]["row_wise", "sgd"]
    for results in trained.values():
        for before, _ in results.values():
            assert torch.equal(before, first)
    assert float(first.abs().max()) <= 2.0 and first.unique(dim=0).shape[0] == SHAPE.num_rows
    assert float(first.std()) == pytest.approx(0.88, abs=0.1)


ROWS = (1 << 24) + 100


def update_last_rows() -> tuple[list[bool], bool]:
    """Which of some ids an update changed, and whether their rows are those of the same ids elsewhere."""
    with process_group("cpu", 60) as world:
        table = ItemTable(TableShape(ROWS, 4), config_of("row_wise", "sgd"), torch.device("cpu"), seed=5)
        # as float32, 2^24 + 1 and 2^24 are the same number
        watched = torch.tensor([0, 1, (1 << 24) - 1, 1 << 24, (1 << 24) + 1, (1 << 24) + 2, ROWS - 2, ROWS - 1])
        before = table(watched).detach().clone()
        touched = watched[[1, 4, 7]] if world.rank == 0 else watched[:0]
        table(touched).sum().backward()
        after = table(watched).detach()
        return (after != before).all(dim=1).tolist(), before.unique(dim=0).shape[0] == watched.numel()


def test_rows_beyond_float32_s_integers_keep_their_identity() -> None:
    for changed, distinct in run_ranks(2, update_last_rows):
        assert changed == [False, True, False, False, True, False, False, True]
        assert distinct
