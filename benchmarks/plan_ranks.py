"""What a plan predicts, measured: bytes that ranks hold after a step, and that a tower keeps for its backward."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.config import ITEM, EmbeddingConfig, TableOptimizerConfig, TableShape
from hstu_dist.distributed.parallel import DenseSettings
from hstu_dist.distributed.planner import build_tables
from hstu_dist.distributed.process_group import World, process_group
from hstu_dist.distributed.recommender import Recommender
from hstu_dist.losses.config import SampledSoftmaxConfig
from hstu_dist.models.config import HSTUConfig, TransformerConfig
from hstu_dist.models.context import sequence_context
from hstu_dist.models.flops import Workload
from hstu_dist.models.tower import Tower
from hstu_dist.plan.job import Job
from hstu_dist.train.config import OptimizerConfig
from hstu_dist.train.optimizer import Optimizers
from hstu_dist.train.retrieval import RetrievalObjective
from hstu_dist.train.step import TrainStep

_LENGTH = 8
_STATUS = Path("/proc/self/statm")
_PAGE = 4096


@dataclass(frozen=True)
class Held:
    """Bytes that one rank holds after a step.

    Attributes:
        tensors: of table, its optimizer, tower, gradients and moments: sizes of their storages.
        process: by how much the resident memory of the process grew.
    """

    tensors: int
    process: int


def job_of(kind: str, num_items: int, ranks: int) -> Job:
    """A run whose table is nearly all of its memory, with a table optimizer of a kind."""
    optimizer = TableOptimizerConfig(kind=kind)  # type: ignore[arg-type]
    return Job(
        model=HSTUConfig(width=128, num_heads=2, num_layers=4, max_length=_LENGTH),
        loss=SampledSoftmaxConfig(num_negatives=8),
        embedding=EmbeddingConfig(optimizer=optimizer),
        num_items=num_items,
        global_batch_size=4 * ranks,
        mean_length=_LENGTH,
    )


def held(kind: str, num_items: int) -> Held:
    """What this rank holds after a step; all ranks call it together, as `run_ranks(n, held, ...)`."""
    with process_group("cpu", 120) as world:
        # code, thread pools and communication buffers come with the first step
        _step(job_of(kind, 1000, world.size), world)
        before = _process_bytes()
        recommender, optimizers = _step(job_of(kind, num_items, world.size), world)
        return Held(tensors=_tensor_bytes(recommender, optimizers), process=_process_bytes() - before)


def saved_bytes(model: HSTUConfig | TransformerConfig, sequences: int) -> int:
    """Bytes of the distinct floating-point storages that a tower saves, its parameters left out.

    Args:
        model: the tower.
        sequences: of the greatest length.
    """
    torch.manual_seed(0)
    tower = Tower(model, torch.device("cpu"))
    batch = _batch([model.max_length] * sequences, num_items=100)
    known = {p.untyped_storage().data_ptr() for p in tower.parameters()}
    # tensors are kept: an address that is free again would be counted once for two
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        place = x.untyped_storage().data_ptr()
        if x.is_floating_point() and place not in known:
            found[place] = x
        return x

    items = torch.randn(batch.num_tokens, model.width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = tower(items, sequence_context(batch, model.max_length, noise_key=1))
    out.sum().backward()
    return sum(x.untyped_storage().nbytes() for x in found.values())


def _step(job: Job, world: World) -> tuple[Recommender, Optimizers]:
    tables = build_tables(job.embedding, {ITEM: TableShape(job.num_items, job.model.width)}, world.device, 1)
    recommender = Recommender(tables, job.model, world.device, 1, DenseSettings())
    optimizers = Optimizers(recommender.tower, recommender.tables.optimizer, OptimizerConfig())
    step = TrainStep(RetrievalObjective(recommender, job.loss, seed=1), optimizers, world)
    lengths = [_LENGTH] * job.sequences_of(world.size)
    step(_batch(lengths, job.num_items), Workload.causal(lengths * world.size), (0, 2))
    return recommender, optimizers


def _batch(lengths: list[int], num_items: int) -> JaggedBatch:
    total = sum(lengths)
    items, times = torch.arange(total) % num_items, torch.arange(total) * 1000
    return JaggedBatch(
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        item_ids=items,
        timestamps=times,
        actions=torch.zeros(total, dtype=torch.int32),
        target_ids=items.flip(0),
        query_times=times + 1000,
        row_ids=torch.arange(len(lengths)),
    )


def _tensor_bytes(recommender: Recommender, optimizers: Optimizers) -> int:
    states = recommender.tables.optimizer.state_tensors()
    states.pop("step", None)
    tables = [*recommender.tables.weights().values(), *states.values()]
    tensors: list[Tensor] = []
    for table in tables:
        tensors += [s.tensor for s in table.local_shards()] if hasattr(table, "local_shards") else [table]
    for parameter in recommender.tower.parameters():
        moments = optimizers.dense.state[parameter]
        assert parameter.grad is not None
        tensors += [parameter.detach(), parameter.grad, moments["exp_avg"], moments["exp_avg_sq"]]
    return sum(x.numel() * x.element_size() for x in tensors)


def _process_bytes() -> int:
    gc.collect()
    # what is free goes back to the system, so that it does not count
    ctypes.CDLL(None).malloc_trim(0)
    return int(_STATUS.read_text().split()[1]) * _PAGE
