"""Triton backend of HSTU attention: fused kernels for NVIDIA and AMD GPUs, bias gradients included.

Only this package imports Triton, and only `backends.load` imports this package. Sums are taken in a fixed order:
no kernel lets two programs add to the same number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_dist.errors import UserError
from hstu_dist.ops.call import AttentionCall, Gradients
from hstu_dist.ops.spec import Activation
from hstu_dist.ops.triton.launch import architecture_of, backward_launches, forward_launches, partial_tables

__all__ = ["backward", "forward"]


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output [T, H, V] in the dtype of q, and for softmax the log-sum-exp [H, T] fp32 (else empty).

    Raises:
        UserError: float64 tensors, a head too wide, or no GPU.
    """
    if call.q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(
            f"attention backend triton: got {call.q.dtype}, expected float32, float16 or bfloat16",
            "use backend=blocked for other types",
        )
    architecture = architecture_of(call.q.device)
    total, heads, _ = call.q.shape
    out = call.q.new_empty(total, heads, call.v.shape[2])
    softmax = call.spec.activation is Activation.SOFTMAX
    lse = call.q.new_empty((heads, total) if softmax else (0,), dtype=torch.float32)
    if total:
        for launch in forward_launches(call, architecture, out, lse):
            launch.run(call.q.device)
    return out, lse


def backward(call: AttentionCall, out: Tensor, lse: Tensor, grad_out: Tensor) -> Gradients:
    """Gradients of q, k, v and of the bias tables, each in the dtype of its tensor.

    Args:
        call: the call of the forward.
        out: its output.
        lse: its log-sum-exp.
        grad_out: [T, H, V] contiguous, dtype of q.
    """
    q, k, v = (x.new_empty(x.shape) for x in (call.q, call.k, call.v))
    if not call.q.shape[0]:
        # no query: nothing to launch, and keys that nobody saw
        position, time = (None if w is None else torch.zeros_like(w) for w in (call.position_weight, call.time_weight))
        return Gradients(q, k.zero_(), v.zero_(), position, time)
    architecture = architecture_of(call.q.device)
    grads = Gradients(q, k, v, *partial_tables(call, architecture))
    for launch in backward_launches(call, architecture, (out, lse), grad_out, grads):
        launch.run(call.q.device)
    return grads._replace(
        position_weight=_summed(grads.position_weight, call.position_weight),
        time_weight=_summed(grads.time_weight, call.time_weight),
    )


def _summed(tables: Tensor | None, weight: Tensor | None) -> Tensor | None:
    if tables is None or weight is None:
        return None
    # float64: one entry sums the gradients of every pair of events
    return tables[:, : weight.numel()].sum(0, dtype=torch.float64).to(weight.dtype)
