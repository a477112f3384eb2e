"""Tables together equal float64 embeddings with torch's own optimizers, however they lie on however many ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.distributed.config import ITEM, EmbeddingConfig, FurtherTableConfig, TableOptimizerConfig, TableShape
from hstu_dist.distributed.planner import build_tables
from hstu_dist.distributed.process_group import process_group
from hstu_dist.distributed.tables import EmbeddingTables
from hstu_dist.errors import UserError
from tests.distributed.cases import whole
from tests.distributed.ranks import run_ranks

# rows that no number of ranks divides; a width that is padded to 16 in the table, which four ranks can split
SHAPE = TableShape(num_rows=97, width=13)
STORED_WIDTH = 16
STEPS = 100
ADAM: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "learning_rate": 0.02}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"learning_rate": 0.1},
    "rowwise_adagrad": {"learning_rate": 0.1},
    "adamw": ADAM,
    "rowwise_adamw": ADAM,
}
# what a step looks up: some rows, or every row, which makes lazy AdamW equal to AdamW
CASES = [
    *product(("row_wise", "table_wise", "data_parallel"), OPTIMIZERS, ("some",)),
    *product(("column_wise",), ("sgd", "adamw"), ("some",)),
    ("row_wise", "adamw", "all"),
]
TOLERANCE = 2e-6


@dataclass
class Trained:
    """A table after training, gathered on every rank.

    Attributes:
        before: weights at the start.
        after: weights at the end.
        state: name, without the table's → state of all rows.
        step: what the optimizer counted.
    """

    before: Tensor
    after: Tensor
    state: dict[str, Tensor]
    step: int


def config_of(sharding: str, kind: str) -> EmbeddingConfig:
    return EmbeddingConfig(sharding=sharding, init_std=1.0, optimizer=optimizer_of(kind))  # type: ignore[arg-type]


def optimizer_of(kind: str) -> TableOptimizerConfig:
    return TableOptimizerConfig(kind=kind, **OPTIMIZERS[kind])  # type: ignore[arg-type]


def table_of(sharding: str, kind: str, shape: TableShape = SHAPE, seed: int = 5) -> EmbeddingTables:
    return build_tables(config_of(sharding, kind), {ITEM: shape}, torch.device("cpu"), seed)


def all_tables() -> EmbeddingTables:
    """The tables of all cases in one, and the item table."""
    further: Any = {
        "_".join(case): FurtherTableConfig(
            sharding=case[0],  # type: ignore[arg-type]
            init_std=1.0,
            optimizer=optimizer_of(case[1]),
        )
        for case in CASES
    }
    # a width of its own: another collection
    shapes = {ITEM: TableShape(num_rows=7, width=3), **dict.fromkeys(further, SHAPE)}
    return build_tables(EmbeddingConfig(tables=further), shapes, torch.device("cpu"), seed=5)


def ids_of(lookup: str, step: int, rank: int, world_size: int) -> Tensor:
    """A rank's ids: repeated within a rank and between ranks; some ranks have none, in step 7 none has any."""
    if lookup == "all":
        return torch.arange(SHAPE.num_rows)[rank::world_size]
    g = torch.Generator().manual_seed(step)
    everyone = torch.randint(SHAPE.num_rows, (0 if step == 7 else 12,), generator=g)
    if step % 3 == 1:
        # all on the last rank
        return everyone if rank == world_size - 1 else everyone[:0]
    return everyone[rank::world_size]


def factor(step: int) -> float:
    """Of the learning rate."""
    return 0.5 if step >= STEPS // 2 else 1.0


def pull(rows: Tensor, ids: Tensor) -> Tensor:
    """A loss whose gradient depends on the weights: each row is drawn towards a vector of its own."""
    columns = torch.arange(rows.shape[1], dtype=rows.dtype)
    goal = torch.sin(ids[:, None] + columns).to(rows.dtype)
    return 0.5 * ((rows - goal) ** 2).sum()


def train_step(tables: EmbeddingTables, ids: Mapping[str, Tensor], factor: float = 1.0) -> None:
    tables.optimizer.prepare(factor)
    rows = tables(ids)
    assert {name: found.shape for name, found in rows.items()} == {
        name: (wanted.numel(), tables.specs[name].shape.width) for name, wanted in ids.items()
    }
    # gradients are averaged over ranks
    loss = torch.stack([pull(rows[name], ids[name]) for name in ids]).sum()
    (loss * dist.get_world_size()).backward()


def weights_of(tables: EmbeddingTables, table: str = ITEM) -> Tensor:
    return whole(tables.weights()[f"collection.embeddings.{table}.weight"])


def state_of(tables: EmbeddingTables, table: str = ITEM) -> dict[str, Tensor]:
    tensors = tables.optimizer.state_tensors()
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, {name: tuple(value.size()) for name, value in tensors.items()})
    shapes = {name: shape for part in names for name, shape in part.items()}
    state = {}
    prefix = f"collection.embeddings.{table}.weight.{table}."
    for name in sorted(shapes):
        if not name.startswith(prefix):
            continue
        if name in tensors:
            state[name.removeprefix(prefix)] = whole(tensors[name])
        else:
            # table-wise: another rank holds it
            dist.all_reduce(missing := torch.zeros(shapes[name]))
            state[name.removeprefix(prefix)] = missing
    return state


def train_all_tables() -> dict[tuple[str, str, str], Trained]:
    with process_group("cpu", 60) as world:
        tables = all_tables()
        before = {case: weights_of(tables, "_".join(case)) for case in CASES}
        for step in range(STEPS):
            ids = {"_".join(case): ids_of(case[2], step, world.rank, world.size) for case in CASES}
            train_step(tables, ids, factor(step))
            if step % 10 == 0:
                # lookups of an evaluation count for nothing; one table may be named alone
                with torch.no_grad():
                    tables({"_".join(CASES[step // 10]): torch.arange(3), ITEM: torch.arange(7)})
        steps = int(tables.optimizer.step)
        return {
            case: Trained(before[case], weights_of(tables, name), state_of(tables, name), steps)
            for case, name in ((case, "_".join(case)) for case in CASES)
        }


def train_embedding(before: Tensor, kind: str, lookup: str, dtype: torch.dtype) -> Trained:
    """One process, dense: torch's optimizer, whose work on rows that were not looked up is undone."""
    embedding = nn.Embedding.from_pretrained(before.to(dtype, copy=True), freeze=False)
    optimizer = REFERENCE[kind](embedding)
    untouched = torch.ones(SHAPE.num_rows, dtype=torch.bool)
    for step in range(STEPS):
        ids = ids_of(lookup, step, 0, 1)
        embedding.zero_grad()
        pull(embedding(ids)[:, : SHAPE.width], ids).backward()
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZERS[kind]["learning_rate"] * factor(step)
        tensors = [embedding.weight.data, *(t for t in optimizer.state[embedding.weight].values() if t.dim())]
        old = [tensor.clone() for tensor in tensors]
        optimizer.step()
        untouched[ids] = False
        for tensor, value in zip(tensors, old, strict=True):
            tensor[untouched] = value[untouched]
        untouched[:] = True
    state = {name: value for name, value in optimizer.state[embedding.weight].items() if name != "step"}
    return Trained(before, embedding.weight.detach(), state, STEPS)


class Rowwise(torch.optim.Optimizer):
    """Dense row-wise Adagrad or AdamW, written out; the mean is over the true width."""

    def __init__(self, kind: str, embedding: nn.Embedding) -> None:
        super().__init__([embedding.weight], OPTIMIZERS[kind])
        self.adagrad = kind == "rowwise_adagrad"
        weight = embedding.weight.data
        self.state[embedding.weight] |= {"total": torch.zeros_like(weight[:, :1])}
        if not self.adagrad:
            self.state[embedding.weight] |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(weight)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        (group,) = self.param_groups
        (weight,) = group["params"]
        state, g, rate = self.state[weight], weight.grad, group["lr"]
        square = (g**2).sum(dim=1, keepdim=True) / SHAPE.width
        if self.adagrad:
            state["total"] += square
            weight -= rate * g / (state["total"].sqrt() + 1e-8)
            return
        (beta1, beta2), decay, eps = group["betas"], group["weight_decay"], group["eps"]
        state["step"] += 1
        state["exp_avg"] += (1 - beta1) * (g - state["exp_avg"])
        state["total"] += (1 - beta2) * (square - state["total"])
        mean = state["exp_avg"] / (1 - beta1 ** state["step"])
        variance = state["total"] / (1 - beta2 ** state["step"])
        weight -= rate * (mean / (variance.sqrt() + eps) + decay * weight)


def adamw(embedding: nn.Embedding) -> torch.optim.Optimizer:
    arguments = {name: value for name, value in ADAM.items() if name != "learning_rate"}
    optimizer = torch.optim.AdamW([embedding.weight], **arguments)
    zeros = torch.zeros_like(embedding.weight)
    # as after no step: torch creates it in the first one, when there is nothing to go back to
    optimizer.state[embedding.weight] = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    return optimizer


REFERENCE: dict[str, Callable[[nn.Embedding], torch.optim.Optimizer]] = {
    "sgd": lambda embedding: torch.optim.SGD([embedding.weight]),
    "rowwise_adagrad": partial(Rowwise, "rowwise_adagrad"),
    "adamw": adamw,
    "rowwise_adamw": partial(Rowwise, "rowwise_adamw"),
}
# our name of each state, as TorchRec has it → the reference's
STATE = {
    "sgd": {},
    "rowwise_adagrad": {"momentum1": "total"},
    "adamw": {"momentum1": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    "rowwise_adamw": {"momentum1": "exp_avg", "exp_avg_sq": "total"},
}


@pytest.fixture(scope="module")
def trained() -> dict[int, dict[tuple[str, str, str], Trained]]:
    return {size: run_ranks(size, train_all_tables)[0] for size in (1, 2, 4)}


def error(value: Tensor, exact: Tensor) -> float:
    """Largest difference, in units of the largest exact value."""
    return float((value - exact.reshape(value.shape)).abs().max() / exact.abs().max())


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_equals_one_float64_embedding(trained: Any, world_size: int, case: tuple[str, str, str]) -> None:
    _, kind, lookup = case
    found: Trained = trained[world_size][case]
    before, after = found.before, found.after
    exact = train_embedding(before, kind, lookup, torch.float64)
    dense = train_embedding(before, kind, lookup, torch.float32)
    assert before.shape == (SHAPE.num_rows, STORED_WIDTH)
    moved = (after != before)[:, : SHAPE.width].all(dim=1)
    used = torch.cat([ids_of(lookup, step, 0, 1) for step in range(STEPS)]).unique()
    assert moved.nonzero().squeeze(1).tolist() == used.tolist()
    # where a gradient was almost zero, AdamW turns its rounding into whole steps: the dense float32 run does, too
    assert error(after, exact.after) <= 2 * error(dense.after, exact.after) + TOLERANCE
    assert found.step == STEPS
    assert found.state.keys() == STATE[kind].keys()
    for ours, theirs in STATE[kind].items():
        bound = 2 * error(dense.state[theirs], exact.state[theirs]) + TOLERANCE
        assert error(found.state[ours], exact.state[theirs]) <= bound
    if "weight_decay" not in OPTIMIZERS[kind]:
        assert torch.equal(after[:, SHAPE.width :], before[:, SHAPE.width :])


@pytest.mark.distributed
def test_initial_weights_do_not_depend_on_the_ranks(trained: Any) -> None:
    for case in CASES:
        first = trained[1][case].before
        assert 0.8 < float(first.std()) < 0.95 and float(first.abs().max()) <= 2
        assert all(torch.equal(results[case].before, first) for results in trained.values())
    # each table has numbers of its own
    assert len({float(trained[1][case].before[0, 0]) for case in CASES}) == len(CASES)


# 5 rows: on 4 ranks the third has one and the last has none, on 8 ranks three have none
UNEVEN = TableShape(num_rows=5, width=4)


SHARDINGS = ("row_wise", "table_wise", "data_parallel")


def tensors_of(tables: EmbeddingTables) -> dict[str, Any]:
    return {**tables.weights(), **tables.optimizer.state_tensors()}


def result_of(tables: EmbeddingTables) -> Trained:
    return Trained(torch.empty(0), weights_of(tables), state_of(tables), int(tables.optimizer.step))


def save_uneven(folder: Path) -> dict[str, Trained]:
    found = {}
    with process_group("cpu", 60) as world:
        for kind in OPTIMIZERS:
            tables = table_of("row_wise", kind, UNEVEN)
            for _ in range(3):
                train_step(tables, {ITEM: torch.arange(UNEVEN.num_rows)[world.rank :]})
            CheckpointManager(folder / f"{kind}-{world.size}", keep=1).save(tensors_of(tables), {"step": 3}, -1)
            found[kind] = result_of(tables)
    return found


def load_uneven(folder: Path) -> dict[tuple[int, str], Trained]:
    found = {}
    with process_group("cpu", 60):
        for kind, sharding, written_by in product(OPTIMIZERS, SHARDINGS, WRITERS):
            tables = table_of(sharding, kind, UNEVEN, seed=6)
            CheckpointManager(folder / f"{kind}-{written_by}", keep=1).load(3, tensors_of(tables))
            found[written_by, f"{kind} {sharding}"] = result_of(tables)
    return found


WRITERS = (1, 2, 8)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, Trained]]]:
    """Checkpoints, and what each number of ranks wrote into them."""
    folder = tmp_path_factory.mktemp("uneven")
    return folder, {ranks: run_ranks(ranks, save_uneven, folder)[0] for ranks in WRITERS}


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_weights_state_and_step_move_between_numbers_of_ranks(world_size: int, uneven: Any) -> None:
    folder, saved = uneven
    for rank in run_ranks(world_size, load_uneven, folder):
        assert len(rank) == len(OPTIMIZERS) * len(SHARDINGS) * len(WRITERS)
        for (written_by, case), loaded in rank.items():
            kind = case.split()[0]
            written = saved[written_by][kind]
            assert torch.equal(loaded.after, written.after)
            # only where the update depends on it
            assert loaded.step == (3 if "adamw" in kind else 0)
            assert loaded.state.keys() == written.state.keys()
            assert all(torch.equal(loaded.state[name], written.state[name]) for name in written.state), case
    assert saved[8]["adamw"].step == 3 and saved[8]["adamw"].state["exp_avg_sq"].all()


def load_changed(folder: Path, embedding: dict[str, Any], shape: TableShape) -> str:
    with process_group("cpu", 60):
        config = EmbeddingConfig(**{"optimizer": optimizer_of("adamw"), **embedding})
        tables = build_tables(config, {ITEM: shape}, torch.device("cpu"), seed=6)
        before = weights_of(tables)
        with pytest.raises(UserError) as caught:
            CheckpointManager(folder, keep=1).load(3, tensors_of(tables))
        assert torch.equal(weights_of(tables), before) and caught.value.remedy
        return caught.value.problem


CHANGED: dict[str, tuple[dict[str, Any], TableShape, str]] = {
    "rows": ({}, TableShape(6, 4), ": got F32 of shape (5, 4), expected F32 of shape (6, 4)"),
    "width": ({}, TableShape(5, 8), ": got F32 of shape (5, 4), expected F32 of shape (5, 8)"),
    "dtype": ({"dtype": "fp16"}, UNEVEN, ".weight: got F32 of shape (5, 4), expected F16 of shape (5, 4)"),
    "less state": (
        {"optimizer": optimizer_of("rowwise_adagrad")},
        UNEVEN,
        ".exp_avg_sq: got F32 of shape (5, 4), expected nothing",
    ),
    "another state": (
        {"optimizer": optimizer_of("rowwise_adamw")},
        UNEVEN,
        ".exp_avg_sq: got F32 of shape (5, 4), expected F32",
    ),
    "no state": ({"optimizer": optimizer_of("sgd")}, UNEVEN, ".exp_avg_sq: got F32 of shape (5, 4), expected nothing"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_table_is_refused_in_one_line_and_left_alone(change: str, uneven: Any) -> None:
    folder, _ = uneven
    embedding, shape, problem = CHANGED[change]
    said = run_ranks(2, load_changed, folder / "adamw-2", embedding, shape)
    assert said[0] == said[1] and said[0].startswith(f"checkpoint {folder / 'adamw-2'}"), said
    assert problem in said[0] and "collection.embeddings.item" in said[0]
