"""One rank of the train_step benchmark: real steps on real batches, timed, then a few of them profiled.

torchrun ... -m benchmarks.train_step_worker REQUEST.json ANSWER.json
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import profile

from benchmarks.harness import clock_of
from hstu_dist.batch import JaggedBatch
from hstu_dist.commands.session import Session
from hstu_dist.config import compose
from hstu_dist.data.split import Split
from hstu_dist.distributed.process_group import World, claim_machine, claim_precision, process_group, sum_over_ranks
from hstu_dist.models.flops import Workload
from hstu_dist.train.hooks import peak_memory_bytes
from hstu_dist.train.step import TrainStep

_GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
"""A smaller product would not fill a GPU."""

_PROFILED_STEPS = 4

PARTS = (
    "attention forward",
    "attention backward",
    "projections",
    "norms, SiLU, gate, dropout",
    "loss",
    "negative draws",
    "table look-up and update",
    "dense optimizer",
    "other",
)
"""Where the time of a step goes, in the order of the printed table."""

# First hit wins, from the innermost event outwards; "projections" are the matrix products outside the loss.
_RULES = (
    ("hstu_dist::attention_backward", "attention backward"),
    ("GeneratedBackwardFor_hstu_dist_attention_defaultBackward", "attention backward"),
    # torch names the forward of a custom operator after its backward
    ("GeneratedBackwardFor_hstu_dist_attention", "attention forward"),
    ("hstu_dist::attention", "attention forward"),
    ("_SoftmaxLoss", "loss"),
    ("loss", "loss"),
    ("aten::mm", "projections"),
    ("aten::addmm", "projections"),
    ("_HSTUBlock", "norms, SiLU, gate, dropout"),
    ("_ProjectSilu", "norms, SiLU, gate, dropout"),
    ("_GatedOutput", "norms, SiLU, gate, dropout"),
    ("_Dropout", "norms, SiLU, gate, dropout"),
    ("aten::native_layer_norm", "norms, SiLU, gate, dropout"),
    ("draw", "negative draws"),
    ("update", "dense optimizer"),
    ("look up", "table look-up and update"),
    ("_LookupRows", "table look-up and update"),
    ("IndexSelectBackward", "table look-up and update"),
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure.

    Attributes:
        overrides: of the run, as for `python -m launch`.
        steps: timed steps, all run once before.
    """

    overrides: list[str]
    steps: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What rank 0 found.

    Attributes:
        seconds: of each timed step.
        tokens: positions of each timed step, all ranks.
        flops: needed FLOPs of each timed step, all ranks.
        gemm_flops_per_second: of a square float32 product between the steps, all ranks together.
        peak_bytes: largest memory of rank 0 in the untimed steps, see `peak_memory_bytes`.
        parts: seconds per step of each of PARTS, in profiled steps of rank 0.
    """

    seconds: list[float]
    tokens: list[int]
    flops: list[int]
    gemm_flops_per_second: list[float]
    peak_bytes: int
    parts: dict[str, float]


def measure(request: Request) -> Answer | None:
    """Runs the steps; all ranks call it together, and rank 0 gets the answer."""
    config = compose(request.overrides)
    with process_group(config.trainer.device, config.trainer.timeout_seconds) as world:
        claim_machine(config.trainer.threads, world)
        claim_precision(config.trainer.precision, world.device)
        session = Session.build(config, world)
        step = TrainStep(session.objective(), session.optimizers, world, config.trainer.micro_batches)
        runner = _Runner(session, step, world)
        batches = list(islice(session.loader(Split.TRAIN).epoch(0), request.steps))
        for batch in batches:
            runner.run(batch)
        # before the matrices of the product, which no training has
        peak = peak_memory_bytes(world.device)
        seconds, gemm, work = [], [], []
        for batch in batches:
            gemm.append(_gemm_rate(world))
            # the batches that follow a product find its matrices in the cache: one untimed step of their own first
            runner.run(batch)
            begin = time.perf_counter()
            work.append(runner.run(batch))
            seconds.append(time.perf_counter() - begin)
        parts = _profiled(runner, batches[: min(_PROFILED_STEPS, len(batches))])
        if not world.is_main:
            return None
        return Answer(
            seconds=seconds,
            tokens=[w.tokens for w in work],
            flops=[session.training_flops(w) for w in work],
            gemm_flops_per_second=gemm,
            peak_bytes=peak,
            parts=parts,
        )


class _Runner:
    """Steps numbered from 0."""

    def __init__(self, session: Session, step: TrainStep, world: World) -> None:
        self.session, self.step, self.world = session, step, world
        self.count = 0

    def run(self, batch: JaggedBatch) -> Workload:
        """Trains on one batch."""
        mine = asdict(self.session.workload(batch.lengths.tolist()))
        total = sum_over_ranks(torch.tensor(list(mine.values()), device=self.world.device)).tolist()
        work = Workload(**dict(zip(mine, total, strict=True)))
        self.step(batch.to(self.world.device), work, (self.count, 1_000_000))
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        self.count += 1
        return work


def _gemm_rate(world: World) -> float:
    size = _GEMM_SIZE[world.device.type]
    a, b = torch.ones(2, size, size, device=world.device)
    torch.mm(a, b)
    dist.barrier()
    rate = 2 * size**3 / clock_of(world.device)(lambda: torch.mm(a, b))
    return float(sum_over_ranks(torch.tensor([rate], dtype=torch.float64, device=world.device)))


def _profiled(runner: _Runner, batches: Sequence[JaggedBatch]) -> dict[str, float]:
    with profile() as profiler:
        for batch in batches:
            runner.run(batch)
    # on a GPU an operator's own time is that of the kernels it launched
    own = "self_device_time_total" if runner.world.device.type == "cuda" else "self_cpu_time_total"
    parts: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        # there kernels and ranges are events, too, beside the operators that have their time already
        if event.device_type != DeviceType.CPU:
            continue
        parts[part_of(_names(event))] += getattr(event, own) / 1e6 / len(batches)
    return {part: parts[part] for part in PARTS}


def _names(event: Any) -> list[str]:
    """Names of an event and of those around it, innermost first."""
    names = []
    while event is not None:
        names.append(str(event.name))
        event = event.cpu_parent
    return names


def part_of(names: Sequence[str]) -> str:
    """The part that the innermost known of these names belongs to; the loss claims all that happens inside it."""
    inside_loss = any(name == "loss" or name.startswith("_SoftmaxLoss") for name in names)
    if inside_loss:
        return "loss"
    for name in names:
        for prefix, part in _RULES:
            if name.startswith(prefix):
                return part
    return "other"


if __name__ == "__main__":
    asked, answered = (Path(argument) for argument in sys.argv[1:])
    answer = measure(Request(**json.loads(asked.read_text())))
    if answer is not None:
        answered.write_text(json.dumps(asdict(answer)))
