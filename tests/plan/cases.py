"""A small job and a made-up cluster whose figures can be checked by hand."""

from __future__ import annotations

from typing import Any

from hstu_dist.distributed.config import EmbeddingConfig, TableOptimizerConfig
from hstu_dist.losses.config import SampledSoftmaxConfig
from hstu_dist.models.config import HSTUConfig
from hstu_dist.plan.config import ChipConfig, FabricConfig, HardwareConfig
from hstu_dist.plan.job import Job


def job(kind: str = "rowwise_adagrad", sharding: str = "row_wise", **changes: Any) -> Job:
    """1,000,003 rows of 52 stored elements; 16 sequences of 10 tokens and 3 negatives each."""
    optimizer = TableOptimizerConfig(kind=kind)  # type: ignore[arg-type]
    settings: dict[str, Any] = {
        "model": HSTUConfig(width=50, num_heads=2, num_layers=2, max_length=10, relative_bias="none"),
        "loss": SampledSoftmaxConfig(num_negatives=3),
        "embedding": EmbeddingConfig(sharding=sharding, optimizer=optimizer),  # type: ignore[arg-type]
        "num_items": 1_000_003,
        "global_batch_size": 16,
        "mean_length": 10,
    }
    return Job(**{**settings, **changes})


def hardware(**changes: Any) -> HardwareConfig:
    """2 nodes of 4 chips: 1 TFLOP/s, 1 GB at 100 GB/s, links of 10 GB/s, a network of 1 GB/s."""
    chip = ChipConfig(name="made up", memory_gb=1, memory_gb_per_second=100, link_gb_per_second=10, peak_flops=1e12)
    settings: dict[str, Any] = {
        "ranks": 8,
        "ranks_per_node": 4,
        "host_memory_gb": 100,
        "chip": chip,
        "fabric": FabricConfig(name="slow", gb_per_second=1),
    }
    return HardwareConfig(**{**settings, **changes})
