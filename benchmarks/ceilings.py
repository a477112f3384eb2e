"""What a device could do in that minute: a matrix product and a copy, timed in turn with the contenders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from benchmarks.harness import GEMM, Gemm, Samples, Step, Timings, gemm
from hstu_dist.report.results import Row

COPY = "copy"
"""Name of the copy among the contenders; that of the product is GEMM."""


@dataclass(frozen=True)
class Copy:
    """A copy between two buffers that no cache holds."""

    size: int
    step: Step

    @property
    def bytes(self) -> float:
        """Bytes read and written by one copy."""
        return 2.0 * self.size


def copy(device: torch.device, size: int) -> Copy:
    """The yardstick of memory on a device, of `size` bytes."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return Copy(size, lambda: target.copy_(source))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step needs, whatever its implementation does beyond.

    Attributes:
        flops: floating-point operations.
        bytes: read and written at least.
    """

    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Both yardsticks of one device."""

    gemm: Gemm
    copy: Copy

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Ceilings:
        """Sizes that fill the device: a GPU's caches and cores are larger; `tiny` for smoke runs."""
        on_gpu = device.type == "cuda"
        size, bytes_ = (8192, 2**31) if on_gpu else (2048, 2**28)
        return cls(gemm=gemm(device, dtype, 64 if tiny else size), copy=copy(device, 2**16 if tiny else bytes_))

    @property
    def steps(self) -> Mapping[str, Step]:
        """To be timed with the contenders."""
        return {GEMM: self.gemm.step, COPY: self.copy.step}

    def rows(self, case: str, timings: Timings) -> Iterator[Row]:
        """Their own rates."""
        for name, amount, unit in ((GEMM, self.gemm.flops, "GFLOP/s"), (COPY, self.copy.bytes, "GB/s")):
            if name in timings.seconds:
                rate = timings.seconds[name].map(lambda s, amount=amount: amount / s / 1e9)  # type: ignore[misc]
                yield rate.row(case, name, "rate", unit)

    def shares(self, name: str, work: Work, timings: Timings) -> Iterator[tuple[str, Samples]]:
        """How much of each ceiling a contender reaches, round by round: (metric, samples)."""
        for metric, ceiling, needed, amount in (
            ("share of gemm rate", GEMM, work.flops, self.gemm.flops),
            ("share of copy bandwidth", COPY, work.bytes, self.copy.bytes),
        ):
            if ceiling in timings.seconds:
                factor = needed / amount
                yield metric, timings.speed_ratio(name, ceiling).map(lambda r, factor=factor: r * factor)  # type: ignore[misc]
