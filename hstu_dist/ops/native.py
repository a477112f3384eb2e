"""The native CPU kernels behind the door: one C call each way, through ctypes.

The library is built at installation, where there is a compiler, and knows nothing of torch. It computes in float32
or float64; half-precision tensors are converted on the way in and out. Importing this module loads the library and
raises ImportError where that fails, so that `backends` can fall back.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_dist.errors import UserError
from hstu_dist.ops.bias import NUM_TIME_BUCKETS, time_bucket
from hstu_dist.ops.call import AttentionCall, Gradients
from hstu_dist.ops.native_abi import Call, Isa, Status, open_library
from hstu_dist.ops.spec import Activation

# after torch, so that both share one OpenMP runtime and its threads
LIBRARY = open_library(Path(__file__).with_name("libhstu_native.so"))


def forward(call: AttentionCall, isa: Isa = Isa.AUTO) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] in the dtype of q and, for softmax, the log-sum-exp [H, T] in float64.

    Args:
        call: tensors on the CPU.
        isa: instruction set; AUTO except in tests.
    """
    arguments = _Arguments(call, isa)
    out = torch.empty(call.q.shape[0], *call.v.shape[1:], dtype=arguments.dtype)
    softmax = call.spec.activation is Activation.SOFTMAX
    # float64: its rounding would scale all weights of a row
    lse = torch.empty((call.q.shape[1], call.q.shape[0]) if softmax else (0,), dtype=torch.float64)
    arguments.point(out=out, lse=lse)
    _check(LIBRARY.hstu_forward(ctypes.byref(arguments.struct)))
    return out.to(call.q.dtype), lse


def backward(call: AttentionCall, out: Tensor, lse: Tensor, grad_out: Tensor, isa: Isa = Isa.AUTO) -> Gradients:
    """Gradients for `grad_out` [T, H, V]: the same bits on every run and any number of threads.

    Args:
        call: tensors on the CPU.
        out: what `forward` returned.
        lse: likewise.
        grad_out: contiguous.
        isa: instruction set; AUTO except in tests.
    """
    arguments = _Arguments(call, isa)
    q, k, v = (torch.empty(x.shape, dtype=arguments.dtype) for x in (call.q, call.k, call.v))
    position, time = (
        None if w is None else torch.empty(w.shape, dtype=torch.float64)
        for w in (arguments.position_weight, call.time_weight)
    )
    out, grad_out = out.to(arguments.dtype), grad_out.to(arguments.dtype)
    arguments.point(out=out, lse=lse, grad_out=grad_out)
    if lse.numel() and (position is not None or time is not None):
        claims = torch.zeros(lse.shape, dtype=torch.int32)
        arguments.point(row_sums=torch.zeros(2, *lse.shape, dtype=torch.float64), row_claims=claims)
    arguments.point(grad_q=q, grad_k=k, grad_v=v, grad_position=position, grad_time=time)
    _check(LIBRARY.hstu_backward(ctypes.byref(arguments.struct)))
    if position is not None:
        position = position[arguments.spare : position.numel() - arguments.spare]
    return Gradients(
        q.to(call.q.dtype),
        k.to(call.k.dtype),
        v.to(call.v.dtype),
        None if position is None or call.position_weight is None else position.to(call.position_weight.dtype),
        None if time is None or call.time_weight is None else time.to(call.time_weight.dtype),
    )


def check_on_cpu(what: str, x: Tensor) -> None:
    """Whether the library can read a tensor.

    Raises:
        UserError: it is on another device.
    """
    if x.device.type != "cpu":
        raise UserError(f"{what}: got tensors on {x.device}, expected the CPU", "use backend=auto")


class _Arguments:
    """The struct of one call, and the tensors that it points to."""

    def __init__(self, call: AttentionCall, isa: Isa) -> None:
        check_on_cpu("attention backend native", call.q)
        self.dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
        q, k, v = (x.to(self.dtype) for x in (call.q, call.k, call.v))
        position, time = (None if w is None else w.to(self.dtype) for w in (call.position_weight, call.time_weight))
        self.spare = 0
        if position is not None:
            # the library indexes by key: of many targets, which share a position, there are more keys than entries
            self.spare = max(0, call.max_key_length - (position.numel() + 1) // 2)
            position = F.pad(position, (self.spare, self.spare))
        self.position_weight = position
        self.struct = Call(
            bytes=ctypes.sizeof(Call),
            threads=torch.get_num_threads(),
            isa=isa,
            is_double=self.dtype == torch.float64,
            is_softmax=call.spec.activation is Activation.SOFTMAX,
            batch=call.offsets.numel() - 1,
            heads=q.shape[1],
            q_width=q.shape[2],
            v_width=v.shape[2],
            window=call.spec.window,
            global_prefix=call.spec.global_prefix,
            table_length=0 if position is None else (position.numel() + 1) // 2,
            alpha=call.spec.alpha,
            normalizer=call.spec.normalizer,
            q_stride=q.stride(0),
            k_stride=k.stride(0),
            v_stride=v.stride(0),
        )
        self._alive: list[Tensor] = []
        self.point(q=q, k=k, v=v, offsets=call.offsets, key_offsets=call.key_offsets)
        self.point(num_contextual=call.num_contextual, num_targets=call.num_targets, position_weight=position)
        if time is not None:
            self.point(time_weight=time, query_times=call.query_times, key_times=call.key_times)
            self.point(time_thresholds=time_thresholds())

    def point(self, **tensors: Tensor | None) -> None:
        """Sets pointers of the struct, and keeps the tensors as long as the struct lives."""
        for name, x in tensors.items():
            if x is not None:
                setattr(self.struct, name, x.data_ptr())
                self._alive.append(x)


@functools.cache
def time_thresholds() -> Tensor:
    """Smallest elapsed time of each bucket 1..128, [128] int64.

    Found by bisection of `time_bucket` itself, so that kernel and specification cannot disagree.
    """
    bucket = torch.arange(1, NUM_TIME_BUCKETS)
    low, high = torch.zeros_like(bucket), torch.full_like(bucket, 2**62)
    for _ in range(63):
        middle = low + (high - low) // 2
        reached = time_bucket(middle) >= bucket
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high


def _check(status: int) -> None:
    if status == Status.OUT_OF_MEMORY:
        raise MemoryError("native attention: its workspace could not be allocated")
    if status != Status.OK:
        raise RuntimeError(f"native attention: the library refused the call ({Status(status).name})")
