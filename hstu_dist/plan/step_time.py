"""Least time of a training step on stated hardware: what the mathematics needs over what the data sheets promise.

No kernel, latency or imbalance is in it: a real step takes longer, and `StepTime` says which part cannot be beaten.
"""

from __future__ import annotations

from dataclasses import dataclass

from hstu_dist.distributed.config import ITEM
from hstu_dist.models.activations import activation_bytes
from hstu_dist.models.flops import count_parameters
from hstu_dist.plan.config import HardwareConfig, PlanConfig
from hstu_dist.plan.job import Job
from hstu_dist.plan.memory import memory_of

_FLOAT = 4
_DAY = 86_400

_ADAMW_PASSES = 7
"""Reads of weight, gradient and two moments, writes of weight and moments."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One step; bytes are those of the busiest rank, seconds lower bounds.

    Attributes:
        flops: of all ranks, forward and backward.
        attention_share: of the FLOPs.
        lookup_bytes: ids, rows and their gradients that it sends to other ranks, all-to-all.
        reduce_bytes: dense gradients that it sends, ring all-reduce; of a split tower its weights, too.
        compute: FLOPs of the fullest rank at the chip's peak.
        memory: activations written and read once, rows and dense state updated, at the bandwidth of the chip's memory.
        lookups: all-to-all over links and network, which work at the same time.
        reduce: all-reduce, inside the nodes first.
        tokens: of all ranks.
        peak_flops: of all ranks.
    """

    flops: int
    attention_share: float
    lookup_bytes: int
    reduce_bytes: int
    compute: float
    memory: float
    lookups: float
    reduce: float
    tokens: int
    peak_flops: float

    @property
    def bound(self) -> float:
        """Seconds if computation and communication overlap entirely."""
        return max(self.compute, self.memory, self.lookups + self.reduce)

    @property
    def serial(self) -> float:
        """Seconds if they do not overlap at all."""
        return max(self.compute, self.memory) + self.lookups + self.reduce

    @property
    def bounded_by(self) -> str:
        """What takes the time of `bound`."""
        parts = {"compute": self.compute, "memory": self.memory, "network": self.lookups + self.reduce}
        return max(parts, key=lambda name: parts[name])

    def mfu(self, seconds: float) -> float:
        """Share of the chips' peak that a step of so many seconds uses; its largest value is that of `bound`."""
        return self.flops / (self.peak_flops * seconds)

    def tokens_per_day(self, seconds: float) -> float:
        """Tokens of a day of such steps."""
        return self.tokens * _DAY / seconds


def step_time(job: Job, hardware: HardwareConfig, plan: PlanConfig) -> StepTime:
    """Least time of a step of `job` on `hardware`."""
    ranks, chip = hardware.ranks, hardware.chip
    total, fullest = job.flops(job.global_batch_size), job.flops(job.sequences_of(ranks))
    peak = chip.peak(plan.precision)
    # an id goes out, its row comes back, the row's gradient follows
    sharing = job.table_ranks(ranks)
    exchanged = job.answered_bytes(ranks, passes=2)
    # all-gathers before forward and backward and a reduce-scatter, in place of an all-reduce, which is two of them
    passes = 1.5 if job.parallel.ranks_of_a_copy(ranks) > 1 else 1.0
    dense = _FLOAT * count_parameters(job.model, num_items=0).dense
    gradients = int(passes * dense) + job.copied_gradient_bytes()
    return StepTime(
        flops=total.training,
        attention_share=total.attention / total.forward,
        lookup_bytes=exchanged * (sharing - 1) // sharing,
        reduce_bytes=2 * gradients * (ranks - 1) // ranks,
        compute=fullest.training / peak,
        memory=_memory_traffic(job, ranks) / (chip.memory_gb_per_second * 1e9),
        lookups=_exchange_seconds(exchanged, sharing, hardware),
        reduce=_reduce_seconds(gradients, hardware),
        tokens=job.tokens,
        peak_flops=peak * ranks,
    )


def _memory_traffic(job: Job, ranks: int) -> int:
    """Bytes that the busiest rank must move at least."""
    memory = memory_of(job, ranks)
    state = job.embedding.optimizer.state_per_row(job.stored_width)
    # a row is read for its look-up, then read and written with its state
    row = 3 * job.tables[ITEM].weight_bytes(1, job.stored_width) + 2 * state * _FLOAT
    # one rank looks everybody's rows up in a whole table; in a copy it updates those of everybody
    others = {"table_wise": job.table_ranks(ranks), "data_parallel": ranks}
    rows = job.ids_of(ranks) * others.get(job.embedding.sharding, 1)
    # all parts of a step write and read theirs, though one is held at a time
    activations = activation_bytes(job.model, job.tokens_of(ranks))
    return 2 * activations + _ADAMW_PASSES * memory.dense + min(rows, job.num_items * ranks) * row


def _exchange_seconds(exchanged: int, ranks: int, hardware: HardwareConfig) -> float:
    """All-to-all of bytes that are spread evenly over the other ones of so many neighbouring ranks."""
    local = min(ranks, hardware.ranks_per_node)
    inside, outside = exchanged * (local - 1) / ranks, exchanged * (ranks - local) / ranks
    return max(
        inside / (hardware.chip.link_gb_per_second * 1e9),
        outside / (hardware.fabric.gb_per_second * 1e9),
    )


def _reduce_seconds(gradients: int, hardware: HardwareConfig) -> float:
    """Reduce-scatter inside a node, all-reduce of each chip's part between nodes, all-gather; pipelined."""
    local, nodes = hardware.ranks_per_node, hardware.nodes
    inside = 2 * (local - 1) / local * gradients
    outside = 2 * (nodes - 1) / nodes * gradients / local
    return max(
        inside / (hardware.chip.link_gb_per_second * 1e9),
        outside / (hardware.fabric.gb_per_second * 1e9),
    )
