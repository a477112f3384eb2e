"""The implementations of attention that are timed, each fed in the layout it likes best.

Packing into that layout is not timed, masks and padded buffers are made beforehand, and outputs stay in the
contender's own layout: the baselines are given every advantage that a model could give them.
Shapes: T tokens, B sequences of at most N tokens, H heads, W head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_cases import Case
from benchmarks.attention_problem import Expected, Problem, make_problem
from benchmarks.harness import Step, relative_error
from hstu_dist.ops.attention import hstu_attention
from hstu_dist.ops.bias import time_bucket
from hstu_dist.ops.spec import Backend

Tensors = tuple[Tensor, ...]


class Form(Protocol):
    """How a [T, H, W] tensor is laid out for a contender: as one tensor, or as one per sequence."""

    def split(self, x_THW: Tensor) -> Tensors:
        """Into the contender's layout, contiguous."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Back to [T, H, W]."""


class Jagged:
    """[T, H, W], no padding."""

    def split(self, x_THW: Tensor) -> Tensors:
        """The tensor itself."""
        return (x_THW,)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor itself."""
        return parts[0]


@dataclass(frozen=True)
class Padded:
    """[B, H, N, W], zeros after each sequence's end."""

    lengths: tuple[int, ...]

    def _rows(self, device: torch.device) -> Tensor:
        """Row of a [B * N] buffer that each of the T tokens lies in."""
        longest = max(self.lengths)
        return torch.cat([torch.arange(n, device=device) + b * longest for b, n in enumerate(self.lengths)])

    def split(self, x_THW: Tensor) -> Tensors:
        """One padded tensor."""
        sequences, longest = len(self.lengths), max(self.lengths)
        flat = x_THW.new_zeros(sequences * longest, *x_THW.shape[1:])
        flat[self._rows(x_THW.device)] = x_THW
        return (flat.view(sequences, longest, *x_THW.shape[1:]).transpose(1, 2).contiguous(),)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The tokens of one padded tensor."""
        x_BNHW = parts[0].transpose(1, 2)
        return x_BNHW.flatten(0, 1)[self._rows(x_BNHW.device)]


@dataclass(frozen=True)
class PerSequence:
    """B tensors [1, H, n, W]."""

    lengths: tuple[int, ...]

    def split(self, x_THW: Tensor) -> Tensors:
        """One tensor per sequence."""
        return tuple(x.transpose(0, 1)[None].contiguous() for x in torch.split(x_THW, list(self.lengths)))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """All sequences end to end."""
        return torch.cat([x[0].transpose(0, 1) for x in parts])


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A contender with its inputs: `forward` and `training` are what is timed.

    Attributes:
        form: layout of q, k, v, the output and the gradients.
        leaves: q, k, v as parts in that layout, and the bias weights, all requiring gradients.
        attend: the output's parts.
        grad_out: parts of the output's gradient.
    """

    form: Form
    leaves: Mapping[str, Tensors]
    attend: Callable[[], Tensors]
    grad_out: Tensors

    def forward(self) -> Tensors:
        """Output with its graph, as the forward of a training step makes it."""
        return self.attend()

    def training(self) -> tuple[Tensors, Tensors]:
        """Output and the gradients of all leaves."""
        out = self.attend()
        flat = [x for parts in self.leaves.values() for x in parts]
        return out, torch.autograd.grad(out, flat, self.grad_out)

    def error(self, expected: Expected) -> float:
        """Largest relative error of output and gradients."""
        out, flat = self.training()
        joined = {"out": self.form.join([x.detach() for x in out])}
        grads = iter(flat)
        for name, parts in self.leaves.items():
            own = [next(grads) for _ in parts]
            joined[name] = self.form.join(own) if own[0].dim() > 1 else own[0]
        errors = [relative_error(expected.part(n, joined[n]), x) for n, x in expected.values.items()]
        # max() would drop a NaN that does not come first
        return float(torch.tensor(errors).max())


def _implementation(
    problem: Problem, form: Form, attend: Callable[[Mapping[str, Tensors]], Tensors], *, bias: bool
) -> Implementation:
    inputs = {n: x for n, x in problem.inputs.items() if bias or x.dim() == 3}
    leaves = {
        n: tuple(part.detach().clone().requires_grad_() for part in (form.split(x) if x.dim() == 3 else (x,)))
        for n, x in inputs.items()
    }
    return Implementation(
        form=form, leaves=leaves, attend=lambda: attend(leaves), grad_out=form.split(problem.grad_out)
    )


def hstu(problem: Problem, backend: Backend) -> Implementation:
    """`hstu_attention` on one of its backends, bias fused where the case has one."""
    spec = problem.hstu_spec(backend)

    def attend(leaves: Mapping[str, Tensors]) -> Tensors:
        single = {name: parts[0] for name, parts in leaves.items()}
        return (hstu_attention(single["q"], single["k"], single["v"], problem.layout, spec, problem.bias(single)),)

    return _implementation(problem, Jagged(), attend, bias=problem.case.bias)


def _sdpa(problem: Problem, form: Form) -> Implementation:
    def attend(leaves: Mapping[str, Tensors]) -> Tensors:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return tuple(
                F.scaled_dot_product_attention(q, k, v, is_causal=True)
                for q, k, v in zip(leaves["q"], leaves["k"], leaves["v"], strict=True)
            )

    return _implementation(problem, form, attend, bias=False)


def sdpa_padded(problem: Problem) -> Implementation:
    """Torch's flash attention: softmax, no bias, causal, on the padded batch."""
    return _sdpa(problem, Padded(problem.case.lengths))


def sdpa_per_sequence(problem: Problem) -> Implementation:
    """Torch's flash attention, called once per sequence: no padding, but a call for each."""
    return _sdpa(problem, PerSequence(problem.case.lengths))


def padded_eager(problem: Problem) -> Implementation:
    """HSTU attention as the paper's research code writes it: padded, scores in memory, bias added to them."""
    case, form = problem.case, Padded(problem.case.lengths)
    device = problem.grad_out.device
    position_N = torch.arange(case.longest, device=device)
    distance_NN = position_N[None, :] - position_N[:, None]
    mask_NN = (distance_NN <= 0).to(problem.grad_out.dtype)
    index_NN = distance_NN + case.longest - 1
    bias = problem.bias(problem.inputs)
    times_BN = None
    if bias is not None and bias.query_times is not None and bias.key_times is not None:
        times_BN = [form.split(t[:, None, None])[0][:, 0, :, 0] for t in (bias.query_times, bias.key_times)]

    def attend(leaves: Mapping[str, Tensors]) -> Tensors:
        single = {name: parts[0] for name, parts in leaves.items()}
        scores_BHNN = single["q"] @ single["k"].transpose(-1, -2)
        if times_BN is not None:
            query_times_BN, key_times_BN = times_BN
            bucket_BNN = time_bucket(query_times_BN[:, :, None] - key_times_BN[:, None, :])
            by_time_BNN = single["time_weight"].index_select(0, bucket_BNN.flatten()).view_as(bucket_BNN)
            rab_BNN = single["position_weight"][index_NN] + by_time_BNN
            scores_BHNN = scores_BHNN + rab_BNN[:, None].to(scores_BHNN.dtype)
        weights_BHNN = F.silu(scores_BHNN) / case.longest * mask_NN
        return (weights_BHNN @ single["v"],)

    return _implementation(problem, form, attend, bias=case.bias)


@dataclass(frozen=True)
class Baseline:
    """A contender from outside the package.

    Attributes:
        build: makes it.
        softmax: it computes causal softmax attention without bias, not HSTU attention.
    """

    build: Callable[[Problem], Implementation]
    softmax: bool


BASELINES: Mapping[str, Baseline] = {
    "sdpa_padded": Baseline(sdpa_padded, softmax=True),
    "sdpa_per_sequence": Baseline(sdpa_per_sequence, softmax=True),
    # the same two under a name that admits what they leave out
    "sdpa_padded_no_bias": Baseline(sdpa_padded, softmax=True),
    "sdpa_per_sequence_no_bias": Baseline(sdpa_per_sequence, softmax=True),
    "padded_eager": Baseline(padded_eager, softmax=False),
}
"""Contenders by name, beside the backends of `hstu_attention`, which go by theirs."""


def computes_softmax(name: str) -> bool:
    """Whether a contender computes softmax attention without bias."""
    return name in BASELINES and BASELINES[name].softmax


def build(name: str, problem: Problem) -> Implementation:
    """A contender by name."""
    return BASELINES[name].build(problem) if name in BASELINES else hstu(problem, Backend(name))


def training_step(name: str, case: Case, device: torch.device, dtype: torch.dtype) -> Step:
    """A contender's training step with inputs of its own, for a process that measures its memory."""
    return build(name, make_problem(case, device, dtype)).training
