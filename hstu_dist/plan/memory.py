"""Memory of the fullest rank, part by part, from the same closed forms and settings that training uses.

Parts are added up although not all of them exist at the same moment: the sum is an upper bound of the peak. What
libraries take for themselves (CUDA context, NCCL) is covered by `PlanConfig.usable_memory`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hstu_dist.models.activations import activation_bytes, gradient_elements
from hstu_dist.models.flops import count_parameters
from hstu_dist.plan.config import HardwareConfig, PlanConfig
from hstu_dist.plan.job import Job

_FLOAT, _ID = 4, 8
"""Bytes: the platform trains in float32, and ids are int64."""

_ADAM_MOMENTS = 2

_SCORE_ELEMENTS, _SCORE_BLOCKS = 1 << 21, 4
"""The chunked softmax scores a block of positions at a time: at least one position, against all rows looked up."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        table: weights of its rows.
        table_optimizer: state of its rows.
        dense: parameters of the tower.
        gradients: of the tower.
        dense_optimizer: AdamW's moments of the tower.
        activations: what the tower keeps for its backward.
        lookups: ids, the rows they name, rows at unit length, the gradients of rows and of the tower's output.
        communication: rows that the all-to-all sends and receives, and their ids.
        workspace: gradients inside one block, and a block of scores.
    """

    table: int
    table_optimizer: int
    dense: int
    gradients: int
    dense_optimizer: int
    activations: int
    lookups: int
    communication: int
    workspace: int

    @property
    def resident(self) -> int:
        """What stays between steps, gradients not counted."""
        return self.table + self.table_optimizer + self.dense + self.dense_optimizer

    @property
    def total(self) -> int:
        """All parts."""
        return sum(asdict(self).values())


def memory_of(job: Job, ranks: int) -> Memory:
    """Memory of the fullest of `ranks` ranks."""
    rows = -(-job.num_items // ranks) if job.embedding.sharding == "row_wise" else job.num_items
    dense = count_parameters(job.model, num_items=0).dense
    tokens, ids, width = job.tokens_of(ranks), job.ids_of(ranks), job.model.width
    row_bytes = job.stored_width * _FLOAT
    kept = ids * (_ID + row_bytes + 2 * width * _FLOAT) + tokens * 3 * width * _FLOAT
    scores = _SCORE_BLOCKS * _FLOAT * max(_SCORE_ELEMENTS, ids)
    state = job.embedding.optimizer.state_per_row(job.stored_width)
    return Memory(
        table=rows * row_bytes,
        table_optimizer=rows * state * _FLOAT,
        dense=dense * _FLOAT,
        gradients=dense * _FLOAT,
        dense_optimizer=_ADAM_MOMENTS * dense * _FLOAT,
        activations=activation_bytes(job.model, tokens),
        # negatives as drawn, and their places among the rows
        lookups=kept + 2 * tokens * job.negatives * _ID,
        communication=0 if ranks == 1 else (1 + served(job, ranks)) * ids * (row_bytes + _ID),
        workspace=tokens * gradient_elements(job.model) * _FLOAT + scores,
    )


def served(job: Job, ranks: int) -> int:
    """Ranks' worth of look-ups that the busiest rank answers: its own share if rows are spread evenly."""
    return 1 if job.embedding.sharding == "row_wise" else ranks


def host_bytes(job: Job, hardware: HardwareConfig) -> int:
    """Host memory of the fullest node while a checkpoint is written: a copy of all that is saved, at most."""
    memory, local = memory_of(job, hardware.ranks), hardware.ranks_per_node
    if job.embedding.sharding == "row_wise":
        return local * memory.resident
    # one rank of one node has the table
    return memory.resident + (local - 1) * (memory.dense + memory.dense_optimizer)


def limit_of(hardware: HardwareConfig, plan: PlanConfig) -> int:
    """Bytes that tensors may take on a chip."""
    return int(hardware.chip.memory_gb * 1e9 * plan.usable_memory)


def fits(job: Job, hardware: HardwareConfig, plan: PlanConfig) -> bool:
    """Whether the fullest rank has room on its chip, its node has room for a checkpoint, and every rank has a row."""
    return not shortages(job, hardware, plan)


def shortages(job: Job, hardware: HardwareConfig, plan: PlanConfig) -> list[str]:
    """What does not fit, each in a few words; empty if all does."""
    found = []
    needed, limit = memory_of(job, hardware.ranks).total, limit_of(hardware, plan)
    if needed > limit:
        found.append(f"{needed / 1e9:.1f} GB on a rank, {limit / 1e9:.1f} GB usable")
    host = host_bytes(job, hardware)
    if host > hardware.host_memory_gb * 1e9:
        found.append(f"{host / 1e9:.1f} GB in a node's memory for a checkpoint, {hardware.host_memory_gb:.1f} GB there")
    if job.embedding.sharding == "row_wise" and job.num_items < hardware.ranks:
        found.append(f"{job.num_items} rows on {hardware.ranks} ranks")
    return found
