"""From an attention call to kernel launches: arguments, tile sizes and grids, without running anything.

A `Launch` can be run, or compiled for a chip that is not here (see `compile_report`): both see the same arguments.
"""

from __future__ import annotations

import functools
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hstu_dist.errors import UserError
from hstu_dist.ops.bias import NUM_TIME_BUCKETS, time_bucket
from hstu_dist.ops.call import AttentionCall, Gradients
from hstu_dist.ops.spec import Activation
from hstu_dist.ops.triton import configs
from hstu_dist.ops.triton.arguments import (
    BackwardTensors,
    Bias,
    ForwardTensors,
    Line,
    Problem,
    Rows,
    Sequences,
    Softmax,
    Tile,
    Variant,
)
from hstu_dist.ops.triton.backward import key_kernel, query_kernel
from hstu_dist.ops.triton.bias_gradient import bias_kernel
from hstu_dist.ops.triton.configs import Architecture, Config, Kernel
from hstu_dist.ops.triton.forward import forward_kernel
from hstu_dist.ops.triton.times import far_kernel

_BINS = 256
_CAPABILITIES = {
    (8, 0): Architecture.SM_80,
    (9, 0): Architecture.SM_90,
    (10, 0): Architecture.SM_100,
    (10, 3): Architecture.SM_100,
}
_MAX_PROGRAMS = 512
_MAX_TABLE_BYTES = 64 << 20
"""Memory of the programs' own position tables: it caps how many programs share the bias gradient."""


@dataclass(frozen=True)
class Launch:
    """One kernel with its arguments; `programs` is the size of its one-dimensional grid."""

    name: Kernel
    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    config: Config

    def run(self, device: torch.device) -> None:
        """Starts the kernel on the current stream of a device."""
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[(self.programs,)](*self.arguments, num_warps=self.config.warps, num_stages=self.config.stages)


@functools.cache
def architecture_of(device: torch.device) -> Architecture:
    """Which table of tile sizes serves a device.

    Raises:
        UserError: there is no GPU, and Triton does not interpret.
    """
    if device.type == "cuda" and torch.version.hip:
        return Architecture.GFX942
    if device.type == "cuda":
        return _CAPABILITIES.get(torch.cuda.get_device_capability(device), Architecture.SM_SMALL)
    if triton.knobs.runtime.interpret:
        return Architecture.INTERPRETER
    raise UserError(f"attention backend triton: got tensors on {device}, expected a GPU", "use backend=auto")


@functools.cache
def bucket_thresholds(device: torch.device) -> Tensor:
    """[129] int64: the least elapsed time of each bucket, found by bisection with `time_bucket` itself."""
    bucket = torch.arange(NUM_TIME_BUCKETS)
    below = torch.full_like(bucket, -1)
    reached = torch.full_like(bucket, 1 << 62)
    while bool((reached - below > 1).any()):
        middle = (below + reached) // 2
        enough = time_bucket(middle.clamp(min=0)) >= bucket
        reached = torch.where(enough, middle, reached)
        below = torch.where(enough, below, middle)
    return reached.clamp(min=0).to(device)


def forward_launches(call: AttentionCall, architecture: Architecture, out: Tensor, lse: Tensor) -> list[Launch]:
    """Launches, in the order they must run, that write `out` [T, H, V] and, for softmax, `lse` [H, T]."""
    softmax = Softmax(lse, None, call.q.shape[0]) if _is_softmax(call) else None
    tensors = ForwardTensors(_rows(call.q), _rows(call.k), _rows(call.v), _rows(out), softmax)
    sequences = _sequences(call)
    forward = _Builder(call, architecture, sequences).launch(Kernel.FORWARD, forward_kernel, tensors)
    return [*_far_launches(call, sequences), forward]


def backward_launches(
    call: AttentionCall, architecture: Architecture, saved: tuple[Tensor, Tensor], grad_out: Tensor, grads: Gradients
) -> list[Launch]:
    """Launches in the order they must run.

    Args:
        call: the call of the forward.
        architecture: where they will run.
        saved: output and log-sum-exp of the forward.
        grad_out: [T, H, V] contiguous.
        grads: what they write; the bias entries as `partial_tables` gives them.
    """
    softmax = out = None
    if _is_softmax(call):
        out = _rows(saved[0])
        softmax = Softmax(saved[1], torch.empty_like(saved[1]), call.q.shape[0])
    shared = BackwardTensors(_rows(call.q), _rows(call.k), _rows(call.v), _rows(grad_out), out, softmax)
    sequences = _sequences(call)
    builder = _Builder(call, architecture, sequences)
    launches = _far_launches(call, sequences)
    tensors = shared._replace(dq=_rows(grads.q))
    launches.append(builder.launch(Kernel.QUERY, query_kernel, tensors))
    tensors = shared._replace(dk=_rows(grads.k), dv=_rows(grads.v))
    launches.append(builder.launch(Kernel.KEY, key_kernel, tensors))
    if grads.position_weight is not None or grads.time_weight is not None:
        tensors = shared._replace(d_position=grads.position_weight, d_time=grads.time_weight)
        launches.append(builder.launch(Kernel.BIAS, bias_kernel, tensors))
    return launches


def _far_launches(call: AttentionCall, sequences: Sequences) -> list[Launch]:
    """The launch that writes `sequences.far`, if the call has times."""
    if sequences.far is None:
        return []
    config = Config(queries=1, keys=1, warps=4, stages=1)
    return [Launch(Kernel.FAR, far_kernel, sequences.far.numel(), (sequences, _bias(call)), config)]


def partial_tables(call: AttentionCall, architecture: Architecture) -> tuple[Tensor | None, Tensor | None]:
    """Tables that the programs of the bias gradient add to, [programs, 2N-1] and [programs, 256] fp32.

    Their sum over programs, taken in a fixed order, is the gradient: no two programs add to the same number.
    """
    tiles = math.ceil(call.max_length / _config(call, architecture, Kernel.BIAS).queries)
    programs = min(tiles * (call.offsets.numel() - 1), _MAX_PROGRAMS)
    position = time = None
    if call.position_weight is not None:
        width = call.position_weight.numel()
        programs = min(programs, max(1, _MAX_TABLE_BYTES // (4 * width)))
        position = torch.zeros(programs, width, dtype=torch.float32, device=call.q.device)
    if call.time_weight is not None:
        time = torch.empty(programs, _BINS, dtype=torch.float32, device=call.q.device)
    return position, time


@dataclass(frozen=True)
class _Builder:
    """What the launches of one call share."""

    call: AttentionCall
    architecture: Architecture
    sequences: Sequences

    def launch(self, name: Kernel, kernel: Any, tensors: Any) -> Launch:
        call = self.call
        config = _config(call, self.architecture, name)
        longest, rows = (call.max_key_length, config.keys) if name is Kernel.KEY else (call.max_length, config.queries)
        tiles = math.ceil(longest / rows)
        heads, sequences = call.q.shape[1], call.offsets.numel() - 1
        scale = 1.0 if _is_softmax(call) else 1.0 / call.spec.normalizer
        problem = Problem(tiles, sequences, heads, call.spec.alpha, scale)
        programs = tiles * heads * sequences
        if name is Kernel.BIAS:
            programs = next(t.shape[0] for t in (tensors.d_position, tensors.d_time) if t is not None)
        arguments = (tensors, self.sequences, _bias(call), problem, _variant(call, name, config))
        return Launch(name, kernel, programs, arguments, config)


def _is_softmax(call: AttentionCall) -> bool:
    return call.spec.activation is Activation.SOFTMAX


def _rows(x: Tensor) -> Rows:
    return Rows(x, x.stride(0))


def _sequences(call: AttentionCall) -> Sequences:
    far = None
    if call.time_weight is not None:
        far = torch.empty(call.offsets.numel() - 1, dtype=torch.int32, device=call.q.device)
    cached = call.key_offsets is not call.offsets
    return Sequences(call.offsets, call.key_offsets if cached else None, call.num_contextual, call.num_targets, far)


def _bias(call: AttentionCall) -> Bias:
    center = 0 if call.position_weight is None else call.position_weight.numel() // 2
    if call.time_weight is None:
        return Bias(call.position_weight, center, None, None, None, None)
    thresholds = bucket_thresholds(call.q.device)
    return Bias(call.position_weight, center, call.time_weight, thresholds, call.query_times, call.key_times)


def _config(call: AttentionCall, architecture: Architecture, kernel: Kernel) -> Config:
    biased = call.position_weight is not None or call.time_weight is not None
    width = 0
    if call.q.dtype != torch.float32:
        width = _padded(max(call.q.shape[2], call.v.shape[2])) - (not _aligned(call))
    return configs.choose(configs.Key(architecture, kernel, width, biased), configs.default_table())


def _aligned(call: AttentionCall) -> bool:
    """Whether the compiler knows that the rows of all heads start at multiples of 16 bytes, for 16-bit numbers."""
    return all(x.stride(0) % 16 == 0 and x.shape[2] % 8 == 0 for x in (call.q, call.k, call.v))


def _padded(width: int) -> int:
    # tensor-core instructions take at least 16 columns
    return max(16, 1 << (width - 1).bit_length())


def _variant(call: AttentionCall, kernel: Kernel, config: Config) -> Variant:
    width, value_width = call.q.shape[2], call.v.shape[2]
    exact = call.q.dtype == torch.float32
    # torch's own switch: tensor cores round float32 to 10 bits of mantissa where it allows them to
    rounded = exact and torch.get_float32_matmul_precision() != "highest"
    return Variant(
        queries=Line(config.queries, kernel is not Kernel.KEY),
        keys=Line(config.keys, kernel is Kernel.KEY),
        q=Tile(config.queries, width, _padded(width)),
        k=Tile(config.keys, width, _padded(width)),
        v=Tile(config.keys, value_width, _padded(value_width)),
        out=Tile(config.queries, value_width, _padded(value_width)),
        softmax=_is_softmax(call),
        window=call.spec.window,
        prefix=call.spec.global_prefix,
        exact=exact,
        precision="tf32" if rounded else "ieee",
    )
