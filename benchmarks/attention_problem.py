"""A benchmark case as tensors, and the exact values that contenders are checked against.

Shapes: T tokens of the batch, H heads, W head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attention_cases import Case
from hstu_dist.ops.attention import hstu_attention
from hstu_dist.ops.bias import NUM_TIME_BUCKETS, RelativeBias, next_event_times
from hstu_dist.ops.spec import Activation, AttentionSpec, Backend, JaggedLayout

EPOCH = 960_000_000
"""First timestamp, in seconds: the year 2000, when MovieLens-1M was collected."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A case's tensors on one device.

    Attributes:
        case: what they were made for.
        layout: the sequences.
        inputs: `q`, `k`, `v`, each [T, H, W], and with bias `position_weight`, `time_weight` (float32).
        grad_out: [T, H, W], what the backward starts from.
        query_times: [T] int64 seconds, or None without bias.
        key_times: [T] int64 seconds, or None without bias.
    """

    case: Case
    layout: JaggedLayout
    inputs: Mapping[str, Tensor]
    grad_out: Tensor
    query_times: Tensor | None
    key_times: Tensor | None

    def bias(self, leaves: Mapping[str, Tensor]) -> RelativeBias | None:
        """The bias over the given weights, or None in a case without."""
        if not self.case.bias:
            return None
        return RelativeBias(
            position_weight=leaves["position_weight"],
            time_weight=leaves["time_weight"],
            query_times=self.query_times,
            key_times=self.key_times,
        )

    def hstu_spec(self, backend: Backend) -> AttentionSpec:
        """The paper's pointwise attention."""
        return AttentionSpec(normalizer=float(self.case.longest), backend=backend)

    def softmax_spec(self) -> AttentionSpec:
        """What scaled dot-product attention computes."""
        scale = self.case.width**-0.5
        return AttentionSpec(normalizer=1.0, alpha=scale, activation=Activation.SOFTMAX, backend=Backend.BLOCKED)


def make_problem(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    """Random tensors of a case, the same in every process."""
    g = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *case.lengths]).cumsum(0)
    shape = (int(offsets[-1]), case.heads, case.width)
    inputs = {name: torch.randn(shape, generator=g).to(device, dtype) for name in "qkv"}
    grad_out = torch.randn(shape, generator=g).to(device, dtype)
    query_times = key_times = None
    if case.bias:
        inputs["position_weight"] = 0.02 * torch.randn(2 * case.longest - 1, generator=g).to(device)
        inputs["time_weight"] = 0.02 * torch.randn(NUM_TIME_BUCKETS, generator=g).to(device)
        times = session_times(shape[0], g)
        query_times, key_times = next_event_times(times, offsets).to(device), times.to(device)
    return Problem(
        case=case,
        layout=JaggedLayout(offsets.to(device)),
        inputs=inputs,
        grad_out=grad_out,
        query_times=query_times,
        key_times=key_times,
    )


def session_times(total: int, generator: torch.Generator) -> Tensor:
    """Event times like those of rating sessions; how much they repeat decides how fast a bias can be.

    Half of the events share their second with the one before, most others follow within minutes, and after one
    in a hundred up to five weeks pass.

    Returns:
        [total] int64 seconds, ascending.
    """
    kind = torch.rand(total, generator=generator)
    gap = torch.empty(total).exponential_(1 / 60, generator=generator).ceil()
    gap = torch.where(kind < 0.5, 0.0, gap)
    gap = torch.where(kind > 0.99, 3e6 * torch.rand(total, generator=generator), gap)
    return EPOCH + gap.to(torch.int64).cumsum(0)


@dataclass(frozen=True)
class Expected:
    """Exact output and gradients of a part of a problem.

    Attributes:
        values: float64; `out` and the gradients of `q`, `k`, `v` are [rows, heads, W], those of the bias weights whole.
        rows: which of the T rows.
        heads: which of the H heads.
    """

    values: Mapping[str, Tensor]
    rows: Tensor
    heads: slice

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What `values[name]` is compared with, of a contender's whole output or gradient."""
        return whole[self.rows, self.heads] if whole.dim() == 3 else whole


def expected(problem: Problem, spec: AttentionSpec, *, bias: bool) -> Expected:
    """Values of `spec` in float64, by the backend that the parity tests hold to the specification.

    Without bias, sequences and heads are independent of each other: the last head of the shortest and of the
    longest sequence is checked, which keeps the check of 8192 tokens to seconds. A bias couples all of them.
    """
    lengths = problem.case.lengths
    chosen = list(range(len(lengths)))
    heads = slice(None)
    if not bias:
        shortest, longest = min(chosen, key=lambda b: lengths[b]), max(chosen, key=lambda b: lengths[b])
        chosen, heads = sorted({shortest, longest}), slice(-1, None)
    offsets = problem.layout.offsets.tolist()
    device = problem.grad_out.device
    rows = torch.cat([torch.arange(offsets[b], offsets[b + 1], device=device) for b in chosen])
    layout = JaggedLayout(torch.tensor([0, *(lengths[b] for b in chosen)], device=device).cumsum(0))

    used = {n: x for n, x in problem.inputs.items() if bias or x.dim() == 3}
    leaves = {
        n: (x[rows, heads] if x.dim() == 3 else x).double().contiguous().requires_grad_() for n, x in used.items()
    }
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    out = hstu_attention(q, k, v, layout, spec, problem.bias(leaves) if bias else None)
    grads = torch.autograd.grad(out, list(leaves.values()), problem.grad_out[rows, heads].double())
    return Expected({"out": out.detach(), **dict(zip(leaves, grads, strict=True))}, rows, heads)
