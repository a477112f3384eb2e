"""Finding a backend by name: the one place where optional backends are imported, lazily."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import cast

import torch

from hstu_dist.errors import UserError
from hstu_dist.ops.call import AttentionBackend
from hstu_dist.ops.row_kernels import RowKernels
from hstu_dist.ops.softmax_spec import SoftmaxBackend, SoftmaxKernel
from hstu_dist.ops.spec import Backend

_LOG = logging.getLogger(__name__)

_MODULES = {
    Backend.BLOCKED: "hstu_dist.ops.blocked",
    Backend.NATIVE: "hstu_dist.ops.native",
    Backend.TRITON: "hstu_dist.ops.triton",
}


@functools.cache
def load(backend: Backend) -> AttentionBackend:
    """The module that implements a fast backend (the reference needs none: autograd differentiates it).

    Raises:
        UserError: the backend cannot run on this machine.
    """
    try:
        # a module with the two functions satisfies the protocol
        return cast(AttentionBackend, importlib.import_module(_MODULES[backend]))
    except ImportError as error:
        raise UserError(
            f"attention backend {backend}: not available on this machine ({error})",
            f"use backend=auto or one of {', '.join(map(str, available(torch.device('cpu'))))}",
        ) from error


def row_kernels(backend: Backend) -> RowKernels:
    """The row kernels that go with an attention backend: native with native, plain PyTorch with all others.

    Raises:
        UserError: the native kernels cannot run on this machine.
    """
    if backend is Backend.NATIVE:
        load(backend)
        return cast(RowKernels, importlib.import_module("hstu_dist.ops.native_rows"))
    return cast(RowKernels, importlib.import_module("hstu_dist.ops.row_kernels"))


def softmax_kernel(backend: SoftmaxBackend) -> SoftmaxKernel:
    """The module that implements a fast backend of the softmax losses.

    Raises:
        UserError: the native kernels cannot run on this machine.
    """
    if backend is SoftmaxBackend.NATIVE:
        load(Backend.NATIVE)
        return cast(SoftmaxKernel, importlib.import_module("hstu_dist.ops.native_softmax"))
    return cast(SoftmaxKernel, importlib.import_module("hstu_dist.ops.softmax_chunked"))


def fastest_softmax(device: torch.device) -> SoftmaxBackend:
    """The fastest backend of the softmax losses on a device."""
    return SoftmaxBackend.NATIVE if device.type == "cpu" and _has_native() else SoftmaxBackend.CHUNKED


@functools.cache
def _has_native() -> bool:
    try:
        importlib.import_module(_MODULES[Backend.NATIVE])
    except ImportError as error:
        _LOG.warning("attention on the CPU runs on the slower backend %s: %s", Backend.BLOCKED, error)
        return False
    return True


def available(device: torch.device) -> list[Backend]:
    """Backends that run on a device, fastest first."""
    fast = [Backend.TRITON] if device.type == "cuda" and importlib.util.find_spec("triton") else []
    if device.type == "cpu" and _has_native():
        fast = [Backend.NATIVE]
    return [*fast, Backend.BLOCKED, Backend.REFERENCE]


def chosen(name: str, device: torch.device) -> Backend:
    """A backend by its name, loaded; `auto` is the fastest one.

    Raises:
        UserError: it cannot run on this machine, or not on this device.
    """
    backend = fastest(device) if name == "auto" else Backend(name)
    if backend is Backend.NATIVE and device.type != "cpu":
        raise UserError(
            f"attention backend {backend}: computes on CPUs, but the device is {device.type}",
            f"use backend=auto or one of {', '.join(map(str, available(device)))}, or trainer.device=cpu",
        )
    if backend is not Backend.REFERENCE:
        load(backend)
    return backend


def fastest(device: torch.device) -> Backend:
    """The backend that `auto` stands for on a device."""
    return available(device)[0]
