"""The smallest changes that make a plan fit, each written as the overrides that a user would type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from hstu_dist.distributed.config import TableOptimizerConfig
from hstu_dist.losses.config import SampledSoftmaxConfig
from hstu_dist.plan.config import HardwareConfig, PlanConfig
from hstu_dist.plan.job import Job
from hstu_dist.plan.memory import fits

_MOST_RANKS = 1 << 16
_WHOLE = ("table_wise", "data_parallel")


def smallest_changes(job: Job, hardware: HardwareConfig, plan: PlanConfig) -> list[str]:
    """Single changes that suffice, the least intrusive first; without any, one combination; else nothing.

    Args:
        job: what does not fit.
        hardware: where.
        plan: how much of a chip may be used.
    """
    found = [text for text, changed in _single(job, hardware, plan) if _works(changed, hardware, plan)]
    ranks = _enough_ranks(job, hardware, plan)
    if ranks:
        found.append(f"cluster.ranks={ranks}")
    if found:
        return found
    # every change that saves memory, together
    words, lean = [], job
    for text, changed in _lean(job, hardware):
        words.append(text)
        lean = changed(lean)
    if words and _works(lean, hardware, plan):
        return [" ".join(words)]
    ranks = _enough_ranks(lean, hardware, plan)
    return [" ".join([*words, f"cluster.ranks={ranks}"])] if ranks else []


def _single(job: Job, hardware: HardwareConfig, plan: PlanConfig) -> Iterator[tuple[str, Job]]:
    """Candidates that change the run alone; of a size only the largest that fits."""
    if job.embedding.sharding in _WHOLE:
        yield "embedding=row_wise", _row_wise(job)
    sequences = _largest(
        job.sequences_of(hardware.ranks) - 1,
        lambda n: fits(replace(job, global_batch_size=n * hardware.ranks), hardware, plan),
    )
    if sequences:
        size = sequences * hardware.ranks
        yield f"trainer.global_batch_size={size}", replace(job, global_batch_size=size)
    if _state(job) > 1:
        yield "embedding.optimizer.kind=rowwise_adagrad", _adagrad(job)
    negatives = _largest(job.negatives - 1, lambda n: fits(_with_negatives(job, n), hardware, plan))
    if negatives:
        yield f"loss.num_negatives={negatives}", _with_negatives(job, negatives)


def _lean(job: Job, hardware: HardwareConfig) -> Iterator[tuple[str, Callable[[Job], Job]]]:
    if job.embedding.sharding in _WHOLE:
        yield "embedding=row_wise", _row_wise
    if job.sequences_of(hardware.ranks) > job.micro_batches:
        size = hardware.ranks * job.micro_batches
        yield f"trainer.global_batch_size={size}", lambda j: replace(j, global_batch_size=size)
    if _state(job) > 1:
        yield "embedding.optimizer.kind=rowwise_adagrad", _adagrad


def _works(job: Job, hardware: HardwareConfig, plan: PlanConfig) -> bool:
    """Whether a launch would take it, and it has room."""
    return job.can_be_arranged(hardware.ranks) and fits(job, hardware, plan)


def _row_wise(job: Job) -> Job:
    return replace(job, embedding=replace(job.embedding, sharding="row_wise"))


def _adagrad(job: Job) -> Job:
    return replace(job, embedding=replace(job.embedding, optimizer=TableOptimizerConfig(kind="rowwise_adagrad")))


def _state(job: Job) -> int:
    """Floats of optimizer state a row."""
    return job.embedding.optimizer.state_per_row(job.stored_width)


def _with_negatives(job: Job, count: int) -> Job:
    assert isinstance(job.loss, SampledSoftmaxConfig)
    return replace(job, loss=replace(job.loss, num_negatives=count))


def _enough_ranks(job: Job, hardware: HardwareConfig, plan: PlanConfig) -> int | None:
    """Least number of ranks, more than there are, on which the same global batch fits."""
    local = hardware.ranks_per_node

    def fit(nodes: int) -> bool:
        return fits(job, replace(hardware, ranks=nodes * local), plan)

    nodes = hardware.nodes
    while not fit(nodes):
        nodes *= 2
        if nodes * local > _MOST_RANKS:
            return None
    # fewer ranks never need less on each, so halves can be searched
    lowest = nodes // 2
    while lowest + 1 < nodes:
        middle = (lowest + nodes) // 2
        lowest, nodes = (lowest, middle) if fit(middle) else (middle, nodes)
    while nodes * local <= _MOST_RANKS and not job.can_be_arranged(nodes * local):
        nodes += 1
    return nodes * local if hardware.nodes < nodes <= _MOST_RANKS // local else None


def _largest(highest: int, suffices: Callable[[int], bool]) -> int | None:
    """Largest of 1 to `highest` that suffices, where smaller ones do too; None: not even 1."""
    if highest < 1 or not suffices(1):
        return None
    lowest = 1
    while lowest < highest:
        middle = (lowest + highest + 1) // 2
        lowest, highest = (middle, highest) if suffices(middle) else (lowest, middle - 1)
    return lowest
