"""The stacks that the encoder benchmark times, each with its batch, ready to run, and what each must compute.

Shapes: T tokens of a jagged batch, or B sequences padded to N; D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.attention_problem import session_times
from benchmarks.encoder_cases import WIDTH, Batch, hstu_config
from benchmarks.encoder_transformer import Layout, Transformer, rotation
from benchmarks.flash import FlashAttention, Sequences
from benchmarks.harness import relative_error
from hstu_dist.models.context import SequenceContext
from hstu_dist.models.hstu import HSTU
from hstu_dist.ops import backends
from hstu_dist.ops.bias import next_event_times
from hstu_dist.ops.jagged import positions
from hstu_dist.ops.spec import Backend, JaggedLayout

Encode = Callable[[nn.Module, Tensor], Tensor]
"""The stack and its input → its output; what it needs to know of the batch is bound."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and in what the stacks compute."""

    device: torch.device
    dtype: torch.dtype
    layers: int


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Layers and the batch they encode.

    Attributes:
        layers: the module.
        encode: runs it.
        x: [T, D] or [B, N, D], requires a gradient.
        grad_out: what the backward starts from.
    """

    layers: nn.Module
    encode: Encode
    x: Tensor
    grad_out: Tensor

    def training(self) -> Sequence[Tensor]:
        """Forward and backward: gradients of the input and of every weight."""
        return torch.autograd.grad(self.encode(self.layers, self.x), [self.x, *self.layers.parameters()], self.grad_out)

    def inference(self) -> Tensor:
        """Forward alone."""
        with torch.no_grad():
            return self.encode(self.layers, self.x)


def error(timed: Stack, exact: nn.Module, encode: Encode) -> float:
    """Largest relative error of a stack's output and gradients.

    Args:
        timed: the stack.
        exact: layers with the same parameters, which take on the stack's values in float64.
        encode: how they encode.
    """
    exact.double().load_state_dict(timed.layers.state_dict())
    x = timed.x.detach().double().requires_grad_()
    out = encode(exact, x)
    grads = torch.autograd.grad(out, [x, *exact.parameters()], timed.grad_out.double())
    pairs = zip([timed.inference(), *timed.training()], [out.detach(), *grads], strict=True)
    # max() would drop a NaN that does not come first
    return float(torch.tensor([relative_error(actual, expected) for actual, expected in pairs]).max())


def hstu(batch: Batch, machine: Machine, *, bias: bool) -> Stack:
    """The package's own layers on its fastest backend."""
    return _hstu(batch, machine, backends.fastest(machine.device), bias=bias)


def hstu_error(batch: Batch, machine: Machine, *, bias: bool) -> float:
    """Largest relative error of the layers against the reference backend in float64."""
    exact = _hstu(batch, machine, Backend.REFERENCE, bias=bias)
    return error(hstu(batch, machine, bias=bias), exact.layers, exact.encode)


def _hstu(batch: Batch, machine: Machine, backend: Backend, *, bias: bool) -> Stack:
    config = hstu_config(batch.longest, machine.layers, bias=bias)
    torch.manual_seed(0)
    layers = HSTU(config, backend, backends.row_kernels(backend)).to(machine.device, machine.dtype)
    context = _context(batch, machine.device)
    return _stack(layers, lambda module, x: module(x, context), (batch.tokens, WIDTH), machine)


def _context(batch: Batch, device: torch.device) -> SequenceContext:
    offsets = _offsets(batch)
    times = session_times(batch.tokens, torch.Generator().manual_seed(0))
    return SequenceContext(
        layout=JaggedLayout(offsets.to(device)),
        positions=positions(offsets).to(device),
        query_times=next_event_times(times, offsets).to(device),
        key_times=times.to(device),
        noise=None,
    )


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A kind of Transformer.

    Attributes:
        flash: its attention.
        padded: over batches padded to the longest sequence; else over jagged ones.
        rotary: its positions; else learned.
    """

    flash: FlashAttention
    padded: bool
    rotary: bool


def transformer(batch: Batch, machine: Machine, baseline: Baseline) -> Stack:
    """The baseline over a batch, padded to the longest or jagged."""
    torch.manual_seed(0)
    layers = Transformer(machine.layers).to(machine.device, machine.dtype)
    flash, shape = baseline.flash, [len(batch.lengths), batch.longest, WIDTH]
    if baseline.padded:
        attend, where = flash.padded, torch.arange(batch.longest, device=machine.device)
    else:
        offsets, shape = _offsets(batch), [batch.tokens, WIDTH]
        sequences = Sequences(batch.lengths, offsets.to(machine.device, torch.int32))
        attend, where = partial(flash.jagged, where=sequences), positions(offsets).to(machine.device)
    turn = rotation(where, machine.dtype) if baseline.rotary else None
    layout = Layout(attend=attend, rotation=turn)
    return _stack(layers, lambda module, x: module(x, layout), shape, machine)


def transformer_error(batch: Batch, machine: Machine, baseline: Baseline) -> float:
    """Largest relative error of the baseline against plain softmax attention in float64."""
    timed = transformer(batch, machine, baseline)
    lengths = (batch.longest,) * len(batch.lengths) if baseline.padded else batch.lengths
    where = torch.cat([torch.arange(n, device=machine.device) for n in lengths])
    turn = rotation(where, torch.float64) if baseline.rotary else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
        return torch.cat([_softmax_attention(*part) for part in parts])

    def encode(layers: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = layers(x.flatten(0, -2), Layout(attend=attend, rotation=turn))
        return out.view_as(x)

    return error(timed, Transformer(machine.layers).to(machine.device), encode)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[n, H, W] of one sequence, scores in memory."""
    scores = torch.einsum("qhw,khw->hqk", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("hqk,khw->qhw", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def _stack(layers: nn.Module, encode: Encode, shape: Sequence[int], machine: Machine) -> Stack:
    g = torch.Generator().manual_seed(1)
    x, grad_out = (torch.randn(shape, generator=g).to(machine.device, machine.dtype) for _ in range(2))
    return Stack(layers=layers, encode=encode, x=x.requires_grad_(), grad_out=grad_out)


def _offsets(batch: Batch) -> Tensor:
    return torch.tensor([0, *batch.lengths]).cumsum(0)


def saved_bytes(stack: Stack) -> int:
    """Bytes of the distinct storages that a forward pass keeps for its backward, the weights left out."""
    known = {p.untyped_storage().data_ptr() for p in stack.layers.parameters()}
    # tensors are kept: an address that is free again would be counted once for two
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        place = x.untyped_storage().data_ptr()
        if x.is_floating_point() and place not in known:
            found[place] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = stack.encode(stack.layers, stack.x)
    del out
    return sum(x.untyped_storage().nbytes() for x in found.values())
