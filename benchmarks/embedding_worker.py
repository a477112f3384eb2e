"""Ranks of the embedding benchmark: a large table in little memory, and what tables take of a training step.

torchrun ... -m benchmarks.embedding_worker REQUEST.json ANSWER.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.memory import high_water_mark
from hstu_dist.batch import JaggedBatch
from hstu_dist.commands.session import Session
from hstu_dist.config import compose
from hstu_dist.data.split import Split
from hstu_dist.distributed.config import ITEM, EmbeddingConfig, TableShape
from hstu_dist.distributed.planner import build_tables
from hstu_dist.distributed.process_group import World, claim_machine, process_group, sum_over_ranks
from hstu_dist.distributed.tables import EmbeddingTables
from hstu_dist.models.flops import Workload
from hstu_dist.train.step import TrainStep


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure.

    Attributes:
        measure: `table` or `step`.
        steps: timed steps.
        embedding: settings of the table.
        rows: of the table.
        width: of the table.
        ids: distinct ids that each rank looks up in a step.
        overrides: of the run whose step is measured.
    """

    measure: str
    steps: int
    embedding: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    width: int = 0
    ids: int = 0
    overrides: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was found.

    Attributes:
        seconds: of each step, of the slowest rank.
        tables: of a step's lookup, backward and update; empty where a step does nothing else.
        build: seconds to build and fill the table.
        peak_bytes: largest resident sizes of all ranks together, code and libraries included.
        state_bytes: weights and optimizer state of all ranks together.
        moved: share of the rows that were looked up and differ from what they began as.
    """

    seconds: list[float]
    tables: list[float] = field(default_factory=list)
    build: float = 0.0
    peak_bytes: int = 0
    state_bytes: int = 0
    moved: float = 0.0


def measure(request: Request) -> Answer | None:
    """Measures; all ranks call it together, and rank 0 gets the answer."""
    with process_group("cpu", 600.0) as world:
        claim_machine(None, world)
        answer = {"table": _measure_table, "step": _measure_step}[request.measure](request, world)
        return answer if world.is_main else None


def _measure_table(request: Request, world: World) -> Answer:
    began = time.perf_counter()
    config = EmbeddingConfig(**request.embedding)
    tables = build_tables(config, {ITEM: TableShape(request.rows, request.width)}, world.device, seed=1)
    built = _slowest(time.perf_counter() - began)
    held = tables.plan.bytes_per_rank(tables.specs)
    drawn = torch.Generator().manual_seed(world.rank)
    lookups = [torch.randint(request.rows, (request.ids,), generator=drawn).unique() for _ in range(request.steps)]
    with torch.no_grad():
        before = tables({ITEM: lookups[0]})[ITEM].clone()
    seconds = [_timed(lambda ids=ids: _train(tables, ids)) for ids in lookups]  # type: ignore[misc]
    with torch.no_grad():
        moved = (tables({ITEM: lookups[0]})[ITEM] != before).any(dim=1).double().mean()
    peak = int(sum_over_ranks(torch.tensor(high_water_mark())))
    return Answer(seconds=seconds, build=built, peak_bytes=peak, state_bytes=sum(held), moved=float(moved))


def _train(tables: EmbeddingTables, ids: Tensor) -> None:
    tables.optimizer.prepare(1.0)
    rows = tables({ITEM: ids})[ITEM]
    (0.5 * rows.square().sum() * dist.get_world_size()).backward()


def _measure_step(request: Request, world: World) -> Answer:
    config = compose(request.overrides)
    session = Session.build(config, world)
    step = TrainStep(session.objective(), session.optimizers, world)
    batches = list(islice(session.loader(Split.TRAIN).epoch(0), request.steps))
    asked: list[Tensor] = []
    tables = session.recommender.tables
    tables.register_forward_pre_hook(lambda _, arguments: asked.append(arguments[0][ITEM]))
    seconds, alone = [], []
    for number, batch in enumerate(batches):
        work = Workload.causal(batch.lengths.tolist())
        run = _runner(step, batch, work, number)
        run()
        seconds.append(_timed(run))
        again = _runner_of(tables, asked[-1])
        again()
        alone.append(_timed(again))
    return Answer(seconds=seconds, tables=alone)


def _runner(step: TrainStep, batch: JaggedBatch, work: Workload, number: int) -> Callable[[], object]:
    return lambda: step(batch, work, (number, 1000))


def _runner_of(tables: EmbeddingTables, ids: Tensor) -> Callable[[], object]:
    return lambda: _train(tables, ids)


def _timed(action: Callable[[], object]) -> float:
    dist.barrier()
    began = time.perf_counter()
    action()
    return _slowest(time.perf_counter() - began)


def _slowest(seconds: float) -> float:
    longest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)


if __name__ == "__main__":
    asked, answered = (Path(argument) for argument in sys.argv[1:])
    answer = measure(Request(**json.loads(asked.read_text())))
    if answer is not None:
        answered.write_text(json.dumps(asdict(answer)))
