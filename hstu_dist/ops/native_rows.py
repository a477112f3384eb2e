"""The native row kernels: one C call each, through ctypes; half-precision rows are computed in float32.

Importing this module loads the library and raises ImportError where that fails.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hstu_dist.ops.native import LIBRARY, check_on_cpu
from hstu_dist.ops.native_abi import Isa, RowOperation, Rows, Status
from hstu_dist.ops.random import Drop, TokenNoise

_LARGEST_DRAW = 1 << 20
"""Above it a draw needs a second random word per number."""


def normalize(x_TW: Tensor, epsilon: float, isa: Isa = Isa.AUTO) -> Tensor:
    """As in RowKernels; `isa` is AUTO except in tests, here and below."""
    return _run(RowOperation.NORMALIZE, (x_TW,), [x_TW.shape[1]], epsilon=epsilon, isa=isa)[0]


def normalize_backward(x_TW: Tensor, grad_TW: Tensor, epsilon: float, isa: Isa = Isa.AUTO) -> Tensor:
    """As in RowKernels."""
    operands = (x_TW, grad_TW)
    return _run(RowOperation.NORMALIZE_BACKWARD, operands, [x_TW.shape[1]], epsilon=epsilon, isa=isa)[0]


def silu(x_TW: Tensor, isa: Isa = Isa.AUTO) -> Tensor:
    """As in RowKernels."""
    return _run(RowOperation.SILU, (x_TW,), [x_TW.shape[1]], isa=isa)[0]


def silu_backward(x_TW: Tensor, grads: tuple[Tensor, ...], isa: Isa = Isa.AUTO) -> Tensor:
    """As in RowKernels."""
    return _run(RowOperation.SILU_BACKWARD, (x_TW, *grads), [x_TW.shape[1]], isa=isa)[0]


def gate(x_TW: Tensor, u_TW: Tensor, epsilon: float, drop: Drop | None, isa: Isa = Isa.AUTO) -> Tensor:
    """As in RowKernels."""
    return _run(RowOperation.GATE, (x_TW, u_TW), [x_TW.shape[1]], epsilon=epsilon, drop=drop, isa=isa)[0]


def gate_backward(
    x_TW: Tensor, u_TW: Tensor, grad_TW: Tensor, epsilon: float, drop: Drop | None, isa: Isa = Isa.AUTO
) -> tuple[Tensor, Tensor]:
    """As in RowKernels."""
    widths = [x_TW.shape[1]] * 2
    operands = (x_TW, u_TW, grad_TW)
    grad_x, grad_u = _run(RowOperation.GATE_BACKWARD, operands, widths, epsilon=epsilon, drop=drop, isa=isa)
    return grad_x, grad_u


def drop(x_TW: Tensor, drop: Drop, isa: Isa = Isa.AUTO) -> Tensor:
    """As in RowKernels."""
    return _run(RowOperation.DROP, (x_TW,), [x_TW.shape[1]], drop=drop, isa=isa)[0]


def integers(noise: TokenNoise, count: int, high: int, isa: Isa = Isa.AUTO) -> Tensor:
    """As in RowKernels."""
    if not 1 <= high <= _LARGEST_DRAW:
        return noise.integers(count, high)
    tokens = _tokens(noise, noise.tokens.numel())
    call = Rows(bytes=ctypes.sizeof(Rows), threads=torch.get_num_threads(), isa=isa, operation=RowOperation.DRAW)
    out = torch.empty(tokens.numel(), count, dtype=torch.int64)
    call.rows, call.width, call.high, call.key = out.shape[0], count, high, noise.key
    call.tokens, call.integers = tokens.data_ptr(), out.data_ptr()
    _check(LIBRARY.hstu_rows(ctypes.byref(call)))
    return out


def _run(
    operation: RowOperation,
    operands: tuple[Tensor, ...],
    out_widths: list[int],
    *,
    isa: Isa,
    epsilon: float = 0.0,
    drop: Drop | None = None,
) -> list[Tensor]:
    first = operands[0]
    check_on_cpu("row backend native", first)
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    # rows may be strided, elements of a row may not
    given = [x.to(dtype) if x.stride(1) == 1 or x.shape[1] <= 1 else x.to(dtype).contiguous() for x in operands]
    outputs = [torch.empty(first.shape[0], width, dtype=dtype) for width in out_widths]
    call = Rows(
        bytes=ctypes.sizeof(Rows),
        threads=torch.get_num_threads(),
        isa=isa,
        is_double=dtype == torch.float64,
        operation=operation,
        rows=first.shape[0],
        width=first.shape[1],
        epsilon=epsilon,
    )
    for i, x in enumerate(given):
        call.input[i], call.input_stride[i] = x.data_ptr(), x.stride(0)
    for i, x in enumerate(outputs):
        call.output[i], call.output_stride[i] = x.data_ptr(), x.stride(0)
    if operation is RowOperation.SILU_BACKWARD:
        for i, grad in enumerate(given[1:]):
            call.part_width[i] = grad.shape[1]
    if drop is not None:
        # alive until the call has ended
        tokens = _tokens(drop.noise, first.shape[0])
        call.tokens, call.key = tokens.data_ptr(), drop.noise.key
        call.threshold, call.scale = drop.threshold, drop.scale
    _check(LIBRARY.hstu_rows(ctypes.byref(call)))
    return [x.to(first.dtype) for x in outputs]


def _tokens(noise: TokenNoise, rows: int) -> Tensor:
    """One number a row, as the library reads them."""
    check_on_cpu("row backend native", noise.tokens)
    if noise.tokens.shape != (rows,) or noise.tokens.dtype != torch.int64:
        raise ValueError(
            f"noise.tokens: got {noise.tokens.dtype} of shape {tuple(noise.tokens.shape)}, "
            f"expected torch.int64 of shape ({rows},), one a row"
        )
    return noise.tokens.contiguous()


def _check(status: int) -> None:
    if status != Status.OK:
        raise RuntimeError(f"native row kernels: the library refused the call ({Status(status).name})")
