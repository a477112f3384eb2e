"""What the devices could do, and how much of it a run used: model FLOPs utilisation (MFU)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import torch

from hstu_dist.distributed.process_group import World, sum_over_ranks
from hstu_dist.machine import Precision, gpu_peak_flops
from hstu_dist.models.flops import Workload
from hstu_dist.train.state import TrainState

_MEASURING_SECONDS = 0.2

logger = logging.getLogger(__name__)


def job_peak_flops(configured: float | None, precision: Precision, world: World) -> float | None:
    """FLOP/s that the devices of all ranks can do together; says on rank 0 where the figure comes from.

    All ranks call it together, after their number of threads is set.

    Args:
        configured: FLOP/s of one rank's device (`trainer.peak_flops`); None: a GPU's data sheet, or on a CPU the
            measured rate of a matrix product.
        precision: of the products.
        world: this rank among the others.

    Returns:
        The sum, equal on every rank; None if the peak of any device is unknown.
    """
    mine, source = (configured, "trainer.peak_flops") if configured else _device_peak(world.device, precision)
    # ranks measure at the same time, as they are going to compute
    parts = torch.tensor([math.nan if mine is None else mine], dtype=torch.float64, device=world.device)
    total = float(sum_over_ranks(parts))
    if math.isnan(total):
        logger.info("MFU is not logged: the peak rate of %s is unknown, set trainer.peak_flops", source)
        return None
    logger.info("peak rate %.4g FLOP/s, all ranks together (%s)", total, source)
    return total


def training_averages(state: TrainState, flops: Callable[[Workload], int]) -> dict[str, float | None]:
    """Speed of the whole training, all sessions together, by rank 0's clock.

    Training is everything between the first and the last step but evaluation: data, steps, checkpoints, logs.

    Args:
        state: of the finished run.
        flops: FLOPs that training on a batch needs.

    Returns:
        train_seconds, evaluation_seconds, training_flops, tokens_per_second and mfu; None: unknown.
    """
    seconds, available = state.train_seconds, state.available_flops
    work = Workload(
        tokens=state.tokens,
        attention_pairs=state.attention_pairs,
        context=state.context,
        skipped_tokens=state.skipped_tokens,
        skipped_pairs=state.skipped_pairs,
    )
    needed = flops(work)
    return {
        "train_seconds": seconds,
        "evaluation_seconds": state.evaluation_seconds,
        "training_flops": needed,
        "tokens_per_second": state.tokens / seconds if seconds else None,
        "mfu": needed / available if available else None,
    }


def _device_peak(device: torch.device, precision: Precision) -> tuple[float | None, str]:
    """FLOP/s of this rank's device, and where the figure comes from."""
    if device.type != "cuda":
        peak = measured_peak_flops(device, torch.bfloat16 if precision == "bfloat16" else torch.float32)
        return peak, f"measured {precision} product, {torch.get_num_threads()} threads a rank"
    name = torch.cuda.get_device_name(device)
    return gpu_peak_flops(name, precision), f"{name}, {precision}, data sheet"


def measured_peak_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Best FLOP/s of square matrix products, as large as fit into a fifth of a second."""
    matrix, best = torch.ones(256, 256, device=device, dtype=dtype), 0.0
    started = time.perf_counter()
    while (begin := time.perf_counter()) < started + _MEASURING_SECONDS:
        torch.mm(matrix, matrix)
        seconds = time.perf_counter() - begin
        best = max(best, 2 * matrix.shape[0] ** 3 / seconds)
        # twice the size takes eight times as long; half of the time is left for repeating the largest
        if begin + 9 * seconds < started + _MEASURING_SECONDS / 2:
            matrix = matrix.repeat(2, 2)
    return best
