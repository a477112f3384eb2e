"""Makes Triton's interpreter compute with bfloat16, whose bit patterns it multiplies as integers and cuts off in casts.

What is not mended here, arithmetic between bfloat16 tensors that are not cast first, stays wrong by many orders of
magnitude: a kernel that did it would fail its parity, not pass it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits: NDArray[Any]) -> NDArray[Any]:
    """Float32 numbers of bfloat16 bit patterns (uint16): the same numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(numbers: NDArray[Any]) -> NDArray[Any]:
    """Bit patterns of the nearest bfloat16 numbers, ties to even, as the hardware casts."""
    rounded = torch.from_numpy(np.array(numbers, dtype=np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def _wide(x: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x


@contextmanager
def mended() -> Iterator[None]:
    """For its duration products are taken of bfloat16 numbers, and casts to bfloat16 round."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        # a product of two bfloat16 numbers is exact in float32, in which tensor cores add up
        return dot(self, _wide(a), _wide(b), *rest)

    def cast_impl(self: Any, source: TensorHandle, to: Any) -> TensorHandle:
        if to.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return TensorHandle(narrow(source.data), tl.bfloat16)
        return cast(self, _wide(source), to)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    try:
        yield
    finally:
        InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast
