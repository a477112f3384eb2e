"""The one public door of HSTU attention: checks a call, then hands it to the chosen backend.

    out = hstu_attention(q, k, v, layout, AttentionSpec(normalizer=211.0), bias)

The fast backends are registered as one pair of torch custom operators, so that autograd, `torch.compile` and
`torch.library.opcheck` treat them alike; the reference is ordinary differentiable PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hstu_dist.ops import backends, reference
from hstu_dist.ops.bias import RelativeBias
from hstu_dist.ops.call import AttentionCall
from hstu_dist.ops.spec import Activation, AttentionSpec, Backend, JaggedLayout, check_call


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    spec: AttentionSpec,
    bias: RelativeBias | None = None,
) -> Tensor:
    """Jagged attention with pointwise activation and fused relative bias (eq. 2).

    A = mask ⊙ SiLU(alpha · q kᵀ + rab) / n and out = A v, for each sequence and head; with
    `Activation.SOFTMAX`, A = softmax over the visible keys of the same scores.

    Args:
        q: [T, H, Q] floating; heads and width contiguous within a row, rows may be strided.
        k: [T_keys, H, Q], as q.
        v: [T_keys, H, V], as q; V may differ from Q.
        layout: the sequences of the batch and their special tokens.
        spec: activation, scaling, window and backend.
        bias: relative bias shared by all heads, or None. Gradients reach its two weights.

    Returns:
        [T, H, V], dtype of q.

    Raises:
        ValueError: a shape, dtype, device, stride or length that does not fit; nothing was computed.
        UserError: the chosen backend does not run on this machine.
    """
    arguments = operator_arguments(q, k, v, layout, spec, bias)
    if spec.backend is Backend.REFERENCE:
        return reference.attention(_call(arguments))
    out: Tensor = torch.ops.hstu_dist.attention(*arguments)[0]
    return out


def operator_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    spec: AttentionSpec,
    bias: RelativeBias | None,
) -> tuple[Any, ...]:
    """A checked call as the operators `hstu_dist::attention` and `attention_backward` take it.

    The first eleven are tensors or None (q, k, v, those of the layout, those of the bias), the others plain values.

    Raises:
        ValueError: as `hstu_attention`.
    """
    check_call(q, k, v, layout, bias)
    return (
        q,
        k,
        v,
        layout.offsets,
        layout.key_offsets,
        layout.num_contextual,
        layout.num_targets,
        None if bias is None else bias.position_weight,
        None if bias is None else bias.time_weight,
        None if bias is None else bias.query_times,
        None if bias is None else bias.key_times,
        layout.max_length,
        layout.max_key_length,
        _pack(spec),
        float(spec.normalizer),
        float(spec.alpha),
    )


def _pack(spec: AttentionSpec) -> str:
    """The discrete part of a spec as one string: custom operators take no dataclasses."""
    return f"{spec.backend},{spec.activation},{spec.window},{spec.global_prefix}"


def _unpack(packed: str, normalizer: float, alpha: float) -> AttentionSpec:
    backend, activation, window, prefix = packed.split(",")
    return AttentionSpec(
        normalizer=normalizer,
        alpha=alpha,
        activation=Activation(activation),
        window=int(window),
        global_prefix=int(prefix),
        backend=Backend(backend),
    )


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? key_offsets, Tensor? num_contextual, Tensor? num_targets, "
    "Tensor? position_weight, Tensor? time_weight, Tensor? query_times, Tensor? key_times, "
    "SymInt max_length, SymInt max_key_length, str spec, float normalizer, float alpha"
)


def _call(args: tuple[Any, ...]) -> AttentionCall:
    *tensors, max_length, max_key_length, spec, normalizer, alpha = args
    q, k, v, offsets, key_offsets, num_contextual, num_targets, pos, ts, query_times, key_times = tensors
    return AttentionCall(
        q=q,
        k=k,
        v=v,
        offsets=offsets,
        key_offsets=offsets if key_offsets is None else key_offsets,
        num_contextual=num_contextual,
        num_targets=num_targets,
        position_weight=pos,
        time_weight=ts,
        query_times=query_times,
        key_times=key_times,
        max_length=max_length,
        max_key_length=max_key_length,
        spec=_unpack(spec, normalizer, alpha),
    )


@torch.library.custom_op("hstu_dist::attention", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def _attention(*args: Any) -> tuple[Tensor, Tensor]:
    call = _call(args)
    return backends.load(call.spec.backend).forward(call)


@torch.library.custom_op(
    "hstu_dist::attention_backward",
    mutates_args=(),
    schema=f"(Tensor out, Tensor lse, Tensor grad_out, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(out: Tensor, lse: Tensor, grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = _call(args)
    grads = backends.load(call.spec.backend).backward(call, out, lse, grad_out.contiguous())
    # an operator returns tensors only: an absent bias gradient is an empty one
    return tuple(call.q.new_empty(0) if g is None else g for g in grads)


@_attention.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    call = _call(args)
    lse = (call.q.shape[1], call.q.shape[0]) if _saves_lse(call.spec) else (0,)
    lse_dtype = torch.float64 if call.spec.backend is Backend.NATIVE else torch.float32
    return call.q.new_empty(call.q.shape[0], *call.v.shape[1:]), call.q.new_empty(lse, dtype=lse_dtype)


@_attention_backward.register_fake
def _(out: Tensor, lse: Tensor, grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = _call(args)
    dense = tuple(x.new_empty(x.shape) for x in (call.q, call.k, call.v))
    weights = (call.position_weight, call.time_weight)
    return (*dense, *(call.q.new_empty(0) if w is None else w.new_empty(w.shape) for w in weights))


def _saves_lse(spec: AttentionSpec) -> bool:
    return spec.activation is Activation.SOFTMAX and spec.backend in (Backend.NATIVE, Backend.TRITON)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:11])
    ctx.scalars = inputs[11:]


def _backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    q, k, v, pos, ts = torch.ops.hstu_dist.attention_backward(out, lse, grad_out, *tensors, *ctx.scalars)
    has_pos, has_ts = tensors[7] is not None, tensors[8] is not None
    return (q, k, v, *[None] * 4, pos if has_pos else None, ts if has_ts else None, *[None] * 7)


_attention.register_autograd(_backward, setup_context=_setup_context)
