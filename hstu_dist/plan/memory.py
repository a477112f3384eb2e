"""Memory of the fullest rank, part by part, from the same closed forms and settings that training uses.

Parts are added up although not all of them exist at the same moment: the sum is an upper bound of the peak. What
libraries take for themselves (CUDA context, NCCL) is covered by `PlanConfig.usable_memory`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hstu_dist.distributed.config import TableSpec
from hstu_dist.models.activations import activation_bytes, gradient_elements
from hstu_dist.models.flops import count_parameters
from hstu_dist.plan.config import HardwareConfig, PlanConfig
from hstu_dist.plan.job import Job

_FLOAT, _ID = 4, 8
"""Bytes: the platform trains in float32, and ids are int64."""

_ADAM_MOMENTS = 2

_SCORE_ELEMENTS, _SCORE_BLOCKS = 1 << 21, 4
"""The chunked softmax takes a block of positions at a time, at least one: scores of all items, or rows of negatives."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        table: weights of its rows on the chip, those in a cache of host memory included.
        table_optimizer: state of its rows on the chip; their moving average and their growing vocabulary, if any.
        dense: parameters of the tower.
        gradients: of the tower.
        dense_optimizer: AdamW's moments of the tower, and its moving average where there is one.
        activations: what the tower keeps for its backward.
        lookups: ids, the rows they name, rows at unit length, the gradients of rows and of the tower's output.
        communication: rows that the all-to-all sends and receives, and their ids; the gradients of a table's copy.
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
    table, state = tables_of(job, ranks).on_chip
    dense = count_parameters(job.model, num_items=0).dense
    share = job.parallel.ranks_of_a_copy(ranks)
    own = -(-dense // share)
    # of a split tower one block is gathered at a time, weights and gradients
    gathered = 2 * -(-dense // job.model.num_layers) if share > 1 else 0
    tokens, ids, width = job.part_tokens_of(ranks), job.ids_of(ranks), job.model.width
    row_bytes = job.stored_width * _FLOAT
    kept = ids * (_ID + row_bytes + 2 * width * _FLOAT) + tokens * 3 * width * _FLOAT
    scores = _SCORE_BLOCKS * _FLOAT * max(_SCORE_ELEMENTS, job.negatives * width or ids)
    own_ids = ids * (row_bytes + _ID)
    communication = job.copied_gradient_bytes() or own_ids + job.answered_bytes(ranks, passes=1)
    return Memory(
        table=table,
        table_optimizer=state,
        dense=own * _FLOAT,
        # parts of a step add up to a whole gradient
        gradients=(own if job.micro_batches == 1 else dense) * _FLOAT,
        dense_optimizer=(_ADAM_MOMENTS + job.averaged) * own * _FLOAT,
        activations=activation_bytes(job.model, tokens),
        # negatives as drawn, and their places among the rows
        lookups=kept + 2 * job.tokens_of(ranks) * job.negatives * _ID,
        communication=0 if ranks == 1 else communication,
        workspace=tokens * gradient_elements(job.model) * _FLOAT + gathered * _FLOAT + scores,
    )


@dataclass(frozen=True)
class TableBytes:
    """Tables of a rank: (weights, optimizer state) in each place; those of kernel key_value are in neither.

    Attributes:
        on_chip: in the chip's memory.
        on_host: in its node's.
    """

    on_chip: tuple[int, int] = (0, 0)
    on_host: tuple[int, int] = (0, 0)

    def __add__(self, other: TableBytes) -> TableBytes:
        chip, host = zip(self.on_chip, other.on_chip, strict=True), zip(self.on_host, other.on_host, strict=True)
        (chip_weights, chip_state), (host_weights, host_state) = (tuple(map(sum, place)) for place in (chip, host))
        return TableBytes((chip_weights, chip_state), (host_weights, host_state))

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.on_chip) + sum(self.on_host)


def tables_of(job: Job, ranks: int) -> TableBytes:
    """Tables of the fullest of `ranks` ranks; what is left to TorchRec's planner counts as split by rows."""
    return _even(job, ranks) + _whole(job, ranks)


def _even(job: Job, ranks: int) -> TableBytes:
    """What every rank has, but for a row."""
    held, ranks = TableBytes(), job.table_ranks(ranks)
    for spec in job.tables.values():
        held += TableBytes(on_chip=(0, spec.vocabulary_bytes(ranks)))
        rows, columns = spec.shape.num_rows, spec.stored_width
        match spec.config.sharding:
            case "row_wise" | "planner":
                held += _place(spec, -(-rows // ranks), columns)
            case "column_wise":
                held += _place(spec, rows, -(-columns // ranks))
            case "data_parallel":
                held += _place(spec, rows, columns)
    return held


def _whole(job: Job, ranks: int) -> TableBytes:
    """Whole tables of the fullest rank: the largest first, each where there is least."""
    whole = [spec for spec in job.tables.values() if spec.config.sharding == "table_wise"]
    tables = [_place(spec, spec.shape.num_rows, spec.stored_width) for spec in whole]
    loads = [TableBytes()] * min(job.table_ranks(ranks), max(1, len(tables)))
    for table in sorted(tables, key=lambda table: -table.total):
        emptiest = min(range(len(loads)), key=lambda rank: loads[rank].total)
        loads[emptiest] += table
    return max(loads, key=lambda load: load.total)


def _place(spec: TableSpec, rows: int, columns: int) -> TableBytes:
    held = spec.weight_bytes(rows, columns), spec.state_bytes(rows, columns)
    match spec.config.compute_kernel:
        case "fused":
            return TableBytes(on_chip=held)
        case "key_value":
            return TableBytes()
    return TableBytes(on_chip=(int(held[0] * (spec.config.cache_load_factor or 0)), 0), on_host=held)


def host_bytes(job: Job, hardware: HardwareConfig) -> int:
    """Host memory of the fullest node while a checkpoint is written: a copy of all that is saved, at most."""
    memory, local = memory_of(job, hardware.ranks), hardware.ranks_per_node
    even, whole = _even(job, hardware.ranks), _whole(job, hardware.ranks)
    dense = memory.dense + memory.dense_optimizer
    # once where it lives, if that is the host, and once in the copy; one rank of one node has the largest whole tables
    return local * (dense + even.total + sum(even.on_host)) + whole.total + sum(whole.on_host)


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
    for spec in job.tables.values():
        if spec.config.sharding in ("row_wise", "planner") and spec.shape.num_rows < job.table_ranks(hardware.ranks):
            found.append(f"{spec.shape.num_rows} rows on {job.table_ranks(hardware.ranks)} ranks")
    return found
