"""Settings of a plan, and the hardware that it is made for; importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hstu_dist.machine import Precision, gpu_peak_flops
from hstu_dist.validation import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PlanConfig:
    """What `plan` assumes where a run cannot tell yet; training ignores it.

    Attributes:
        num_items: rows of the item table; null: those of the prepared data set.
        mean_length: inputs of a sequence; null: data.max_length, as if every sequence were full.
        dataset_tokens: size of a data set, to plan the GPU-days of a pass over it; null: none.
        precision: arithmetic of the matrix products that the chip's peak is read for: float32 as torch sets it, tf32 if
            the user allows it, bfloat16 as an outlook: tensors are counted in float32, as the platform trains.
        usable_memory: share of a chip's memory that tensors may take; the rest is for the CUDA context, NCCL's buffers
            and fragmentation. An assumption.
    """

    num_items: int | None = Field(default=None, gt=0)
    mean_length: int | None = Field(default=None, gt=0)
    dataset_tokens: int | None = Field(default=None, gt=0)
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    usable_memory: float = Field(default=0.9, gt=0, le=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChipConfig:
    """One accelerator, by its maker's data sheet.

    Attributes:
        name: as the driver calls it, such as `H100 SXM`.
        memory_gb: 1e9 bytes; the cautious reading of a data sheet.
        memory_gb_per_second: bandwidth of that memory.
        link_gb_per_second: to the other chips of its node, in each direction.
        peak_flops: FLOP/s of dense matrix products; null: what `hstu_dist.machine` knows of the name.
    """

    name: str = Field(min_length=1)
    memory_gb: float = Field(gt=0)
    memory_gb_per_second: float = Field(gt=0)
    link_gb_per_second: float = Field(gt=0)
    peak_flops: float | None = Field(default=None, gt=0)

    def __post_init__(self) -> None:
        if self.peak_flops is None and gpu_peak_flops(self.name, "float32") is None:
            raise ValueError(f"peak_flops: got null for the unknown chip {self.name!r}, expected FLOP/s")

    def peak(self, precision: Precision) -> float:
        """FLOP/s of dense matrix products."""
        known = self.peak_flops or gpu_peak_flops(self.name, precision)
        assert known is not None
        return known


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FabricConfig:
    """The network between nodes.

    Attributes:
        name: for people.
        gb_per_second: 1e9 bytes a second and rank, in each direction.
    """

    name: str
    gb_per_second: float = Field(gt=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HardwareConfig:
    """A cluster that a plan is made for; it need not exist.

    Attributes:
        ranks: chips; a multiple of `ranks_per_node`.
        ranks_per_node: chips of a node.
        host_memory_gb: of a node, 1e9 bytes.
        chip: all chips are alike.
        fabric: the network between nodes.
    """

    ranks: int = Field(gt=0)
    ranks_per_node: int = Field(gt=0)
    host_memory_gb: float = Field(gt=0)
    chip: ChipConfig
    fabric: FabricConfig

    def __post_init__(self) -> None:
        if self.ranks % self.ranks_per_node:
            raise ValueError(f"ranks: got {self.ranks}, expected a multiple of ranks_per_node ({self.ranks_per_node})")

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.ranks // self.ranks_per_node
