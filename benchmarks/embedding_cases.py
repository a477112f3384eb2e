"""Contenders of the embedding benchmark on one rank: our tables, and torch's embedding with optimizers by hand.

Shapes: R rows, D width, N ids looked up, U distinct ones. Each step looks up, differentiates a weighted sum of the
rows and updates those that were looked up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.harness import Contender, relative_error
from hstu_dist.distributed.config import ITEM, EmbeddingConfig, TableOptimizerConfig, TableShape
from hstu_dist.distributed.planner import build_tables
from hstu_dist.distributed.table_optimizer import TableOptimizer
from hstu_dist.distributed.table_plan import configured_plan
from hstu_dist.distributed.torchrec_tables import sharded_tables

METRIC = "lookup, backward and update"
OURS, EXCHANGED = "hstu_dist", "hstu_dist through TorchRec's exchange"
BY_HAND = ("nn.Embedding", "nn.Embedding, sparse gradient")

_CPU = torch.device("cpu")
_CHECKED_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a step looks up.

    Attributes:
        name: for the result file.
        shape: of the table.
        ids: how many, drawn evenly; None: every row once, in order, as where negatives cover a small catalogue.
    """

    name: str
    shape: TableShape
    ids: int | None

    def lookup(self) -> Tensor:
        """Distinct ids [U], ascending, as training asks for."""
        if self.ids is None:
            return torch.arange(self.shape.num_rows)
        drawn = torch.randint(self.shape.num_rows, (self.ids,), generator=torch.Generator().manual_seed(1))
        distinct: Tensor = drawn.unique()
        return distinct


CASES = (
    Case(name="3,706 rows x 50, all of them", shape=TableShape(3_706, 50), ids=None),
    Case(name="1,000,000 rows x 64, 20,000 ids", shape=TableShape(1_000_000, 64), ids=20_000),
)
KINDS = ("rowwise_adagrad", "rowwise_adamw", "adamw", "sgd")

Run = Callable[[Tensor], None]
"""One step with the weights [U, D] of the sum; they are also the gradient of the rows."""


def contenders(case: Case, kind: str) -> list[Contender]:
    """All contenders of a case, checked against float64; the process group must have one rank."""
    ids = case.lookup()
    goals = torch.randn(ids.numel(), case.shape.width, generator=torch.Generator().manual_seed(2))
    config = TableOptimizerConfig(kind=kind)  # type: ignore[arg-type]
    exact = _by_hand(case, config, ids, sparse=False, dtype=torch.float64)
    for _ in range(_CHECKED_STEPS):
        exact.step(goals.double())
    wanted = exact.rows()
    made = [_ours(case, config, ids), _exchanged(case, config, ids)]
    made += [_by_hand(case, config, ids, sparse=sparse, dtype=torch.float32) for sparse in (False, True)]
    names = (OURS, EXCHANGED, *BY_HAND)
    return [_contender(name, table, goals, wanted) for name, table in zip(names, made, strict=True)]


@dataclass(frozen=True)
class _Table:
    step: Run
    rows: Callable[[], Tensor]


def _contender(name: str, table: _Table, goals: Tensor, wanted: Tensor) -> Contender:
    def error() -> float:
        for _ in range(_CHECKED_STEPS):
            table.step(goals)
        return relative_error(table.rows(), wanted)

    return Contender(name=name, steps={METRIC: lambda: table.step(goals)}, error=error)


def _ours(case: Case, optimizer: TableOptimizerConfig, ids: Tensor) -> _Table:
    tables = build_tables(_config(optimizer), {ITEM: case.shape}, _CPU, seed=1)
    with torch.no_grad():
        (weight,) = tables.weights().values()
        weight.copy_(_initial(case))

    def step(goals: Tensor) -> None:
        tables.optimizer.prepare(1.0)
        (tables({ITEM: ids})[ITEM] * goals).sum().backward()

    return _Table(step, lambda: tables({ITEM: ids})[ITEM].detach())


def _exchanged(case: Case, optimizer: TableOptimizerConfig, ids: Tensor) -> _Table:
    """As several ranks do it: the way through TorchRec's exchange, with one rank at its end."""
    specs = _config(optimizer).specs({ITEM: case.shape})
    tables = sharded_tables(specs, configured_plan(specs, dist.get_world_size()), _CPU)
    assert tables is not None
    with torch.no_grad():
        (weight,) = tables.state_dict().values()
        weight.local_shards()[0].tensor.copy_(_initial(case))
    optimizers = TableOptimizer(specs, tables.fused_optimizer, {})
    width = case.shape.width

    def step(goals: Tensor) -> None:
        optimizers.prepare(1.0)
        (tables({ITEM: ids})[ITEM][:, :width] * goals).sum().backward()

    return _Table(step, lambda: tables({ITEM: ids})[ITEM][:, :width].detach())


def _config(optimizer: TableOptimizerConfig) -> EmbeddingConfig:
    return EmbeddingConfig(optimizer=optimizer)


def _initial(case: Case) -> Tensor:
    """[R, stored width]."""
    width = _config(TableOptimizerConfig()).specs({ITEM: case.shape})[ITEM].stored_width
    return torch.randn(case.shape.num_rows, width, generator=torch.Generator().manual_seed(3)).mul_(0.02)


def _by_hand(case: Case, optimizer: TableOptimizerConfig, ids: Tensor, *, sparse: bool, dtype: torch.dtype) -> _Table:
    start = _initial(case)[:, : case.shape.width].to(dtype)
    embedding = nn.Embedding.from_pretrained(start.clone(), freeze=False, sparse=sparse)
    update = _HAND[optimizer.kind](embedding.weight.data, optimizer)

    def step(goals: Tensor) -> None:
        embedding.zero_grad()
        (embedding(ids) * goals).sum().backward()
        with torch.no_grad():
            grad = embedding.weight.grad
            assert grad is not None
            if sparse:
                grad = grad.coalesce()
                update(grad.indices()[0], grad.values())
            else:
                touched = ids.unique()
                update(touched, grad[touched])

    return _Table(step, lambda: embedding(ids).detach())


Update = Callable[[Tensor, Tensor], None]
"""Updates rows [U], given their gradients [U, D]."""


def _sgd(weight: Tensor, optimizer: TableOptimizerConfig) -> Update:
    rate = optimizer.learning_rate
    assert rate is not None

    def update(rows: Tensor, grad: Tensor) -> None:
        weight.index_add_(0, rows, grad, alpha=-rate)

    return update


def _adagrad(weight: Tensor, optimizer: TableOptimizerConfig) -> Update:
    rate, eps = optimizer.learning_rate, optimizer.eps
    assert rate is not None
    assert eps is not None
    total = weight.new_zeros(weight.shape[0])

    def update(rows: Tensor, grad: Tensor) -> None:
        total[rows] += grad.square().mean(dim=1)
        weight[rows] -= rate * grad / (total[rows].sqrt() + eps)[:, None]

    return update


def _adamw(weight: Tensor, optimizer: TableOptimizerConfig) -> Update:
    rate, eps, decay, betas = optimizer.learning_rate, optimizer.eps, optimizer.weight_decay, optimizer.betas
    assert rate is not None
    assert eps is not None
    assert decay is not None
    assert betas is not None
    beta1, beta2 = betas
    rowwise = optimizer.kind == "rowwise_adamw"
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight[:, :1] if rowwise else weight)
    steps = 0

    def update(rows: Tensor, grad: Tensor) -> None:
        nonlocal steps
        steps += 1
        squared = grad.square().mean(dim=1, keepdim=True) if rowwise else grad.square()
        m = mean[rows].lerp_(grad, 1 - beta1)
        v = square[rows].lerp_(squared, 1 - beta2)
        mean[rows], square[rows] = m, v
        root = v.sqrt() / math.sqrt(1 - beta2**steps) + eps
        weight[rows] = weight[rows] * (1 - rate * decay) - rate / (1 - beta1**steps) * m / root

    return update


_HAND: dict[str, Callable[[Tensor, TableOptimizerConfig], Update]] = {
    "sgd": _sgd,
    "rowwise_adagrad": _adagrad,
    "adamw": _adamw,
    "rowwise_adamw": _adamw,
}
