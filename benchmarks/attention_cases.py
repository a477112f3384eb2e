"""Which attention problems are timed, how much work each needs, and the figures it is held to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.environment import ROOT
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.schema import MANIFEST_FILE

ML1M_LONGEST = 200
"""Events of a MovieLens-1M history that a training step reads."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of the problem, and the figures it is held to.

    Attributes:
        key: short name, for the command line.
        name: as it appears in the result file.
        lengths: of the sequences.
        heads: H.
        width: W, of queries, keys and values.
        bias: position and time bias.
        baselines: contenders beside the backends of this device; see `attention_contenders.BASELINES`.
        speed_targets: the fastest backend over a contender (`sdpa` stands for the best of its variants).
        gemm_target: the fastest backend's rate over the rate of the matrix product.
        memory_limit_mb: peak extra memory that the fastest backend may use.
    """

    key: str
    name: str
    lengths: tuple[int, ...]
    heads: int
    width: int
    bias: bool = False
    baselines: tuple[str, ...] = ()
    speed_targets: Mapping[str, float] = field(default_factory=dict)
    gemm_target: float | None = None
    memory_limit_mb: float | None = None

    @property
    def longest(self) -> int:
        """N, the length that padding pads to."""
        return max(self.lengths)

    def flops(self, *, backward: bool) -> float:
        """Needed floating-point operations: the causal half only, and no padding.

        A sequence of n tokens has n (n + 1) / 2 visible pairs a head, and a matrix product costs 2 W operations a
        pair. The forward needs two products (q kᵀ and A v). The backward needs five: q kᵀ again, because keeping
        n² scores would not be linear in memory, then dA = dout vᵀ, dv = Aᵀ dout, dq = dS k and dk = dSᵀ q. Activation,
        bias and mask count nothing. Contenders that keep the scores, or compute masked ones, are given the same
        count: the rate says how fast the needed work gets done.
        """
        pairs = sum(n * (n + 1) // 2 for n in self.lengths) * self.heads
        return pairs * 2.0 * self.width * (7 if backward else 2)

    def tiny(self) -> Case:
        """The same kind of problem in miniature, for smoke runs and rehearsals; held to nothing."""
        lengths = tuple(sorted(self.lengths)[:: max(1, len(self.lengths) // 3)])
        lengths = tuple(max(1, round(n * 48 / self.longest)) for n in lengths)
        name = f"{self.name}, in miniature"
        return replace(self, name=name, lengths=lengths, speed_targets={}, gemm_target=None, memory_limit_mb=None)


def cases() -> tuple[Case, ...]:
    """All attention cases."""
    long = Case(
        key="long",
        name="B2 H4 N8192 d64",
        lengths=(8192, 8192),
        heads=4,
        width=64,
        baselines=("sdpa_padded", "sdpa_per_sequence"),
        speed_targets={"sdpa": 1.5, "blocked": 2.0},
        gemm_target=0.9,
        memory_limit_mb=150.0,
    )
    quarter = Case(
        key="quarter",
        name="B1 H2 N8192 d64 (1/4, for padded eager)",
        lengths=(8192,),
        heads=2,
        width=64,
        baselines=("padded_eager",),
        speed_targets={"blocked": 2.0},
    )
    jagged = Case(
        key="jagged",
        name="B16 H4 lengths 100..1024 d64",
        lengths=spread_lengths(100, 1024, 16),
        heads=4,
        width=64,
        baselines=("sdpa_padded", "sdpa_per_sequence", "padded_eager"),
        speed_targets={"sdpa": 2.0, "blocked": 2.0},
        gemm_target=0.6,
    )
    ml1m = Case(
        key="ml1m",
        name="B128 H1 lengths of ML-1M d50, position and time bias",
        lengths=_shuffled(_quantiles(_ml1m_histogram(ROOT / "data" / "ml1m"), 128)),
        heads=1,
        width=50,
        bias=True,
        baselines=("sdpa_padded_no_bias", "sdpa_per_sequence_no_bias", "padded_eager"),
        speed_targets={"padded_eager": 8.0, "blocked": 2.0},
    )
    return long, quarter, jagged, ml1m


def one_sequence(length: int) -> Case:
    """A single sequence and head, to see how memory grows with length."""
    return Case(key=f"n{length}", name=f"B1 H1 N{length} d64", lengths=(length,), heads=1, width=64)


def spread_lengths(shortest: int, longest: int, count: int) -> tuple[int, ...]:
    """Evenly spaced lengths in a fixed random order."""
    return _shuffled([round(n) for n in torch.linspace(shortest, longest, count).tolist()])


def _ml1m_histogram(dataset: Path) -> Counter[int]:
    """Users by min(events, 200): of the prepared data set if there is one, else as counted from it earlier."""
    if (dataset / MANIFEST_FILE).exists():
        return Counter(min(int(n), ML1M_LONGEST) for n in SequenceDataset.open(dataset).lengths)
    stored = json.loads((Path(__file__).parent / "ml1m_lengths.json").read_text())
    return Counter(dict(enumerate(stored["users"], start=stored["first"])))


def _quantiles(histogram: Counter[int], count: int) -> list[int]:
    """Evenly spaced quantiles: the smallest batch that looks like the whole."""
    ordered = sorted(histogram.elements())
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def _shuffled(lengths: Sequence[int]) -> tuple[int, ...]:
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
    return tuple(lengths[i] for i in order.tolist())
