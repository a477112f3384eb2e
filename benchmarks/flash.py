"""Causal softmax attention from outside: torch's flash backends, and flash-attn 2, 3, 4 where they are installed.

Shapes: B sequences of N tokens, T tokens of a jagged batch, H heads, W head width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hstu_dist.errors import UserError


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a jagged batch lie.

    Attributes:
        lengths: of each.
        offsets: [B+1] int32, on the device.
    """

    lengths: tuple[int, ...]
    offsets: Tensor


Padded = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [B, N, H, W] → [B, N, H, W]."""


class Jagged(Protocol):
    """Attention within the sequences of a jagged batch."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: Sequences) -> Tensor:
        """q, k, v [T, H, W] → [T, H, W]."""


@dataclass(frozen=True, kw_only=True)
class FlashAttention:
    """One implementation.

    Attributes:
        name: as it appears in the result file.
        padded: on padded batches.
        jagged: on jagged ones.
        version: of the package that it comes from.
    """

    name: str
    padded: Padded
    jagged: Jagged
    version: str


@dataclass(frozen=True, kw_only=True)
class _Package:
    """A package of fused kernels.

    Attributes:
        distribution: what pip installs.
        module: where its functions are.
        major: first number of a version that fits.
        install: how to get it.
    """

    distribution: str
    module: str
    major: int
    install: str


PACKAGES: Mapping[str, _Package] = {
    "flash-attn 2": _Package(
        distribution="flash-attn",
        module="flash_attn",
        major=2,
        install="pip install 'flash-attn>=2.6,<3' --no-build-isolation",
    ),
    "flash-attn 3": _Package(
        distribution="flash-attn-3",
        module="flash_attn_interface",
        major=3,
        install="build it from the folder hopper of the flash-attention repository",
    ),
    "flash-attn 4": _Package(
        distribution="flash-attn-4", module="flash_attn.cute", major=4, install="pip install flash-attn-4"
    ),
}
"""By name; each needs a GPU."""

SDPA = "SDPA flash"
NAMES = (SDPA, *PACKAGES)


def implementation(name: str, device: torch.device) -> FlashAttention:
    """One of NAMES on a device.

    Raises:
        UserError: unknown, not installed, of the wrong version, or not for this device.
    """
    if name == SDPA:
        jagged = _torch_varlen if device.type == "cuda" else _per_sequence
        return FlashAttention(name=name, padded=_sdpa, jagged=jagged, version=torch.__version__)
    if name not in PACKAGES:
        raise UserError(f"contender: got {name!r}, expected one of {', '.join(NAMES)}", "see --help")
    package = PACKAGES[name]
    if device.type != "cuda":
        raise UserError(f"{name}: runs on GPUs only, got device {device}", f"leave it out: on a CPU, {SDPA} stands in")
    found = _checked_version(name, package)
    try:
        module = importlib.import_module(package.module)
        padded, jagged = module.flash_attn_func, module.flash_attn_varlen_func
    except (ImportError, AttributeError, OSError) as error:
        raise UserError(f"{name}: {package.distribution} {found} cannot be used ({error})", package.install) from error
    return FlashAttention(
        name=name, padded=partial(_packaged, padded), jagged=partial(_packaged_varlen, jagged), version=found
    )


def installed(device: torch.device) -> tuple[list[FlashAttention], dict[str, str]]:
    """What runs on a device, and why each of the others does not."""
    found, missing = [], {}
    for name in NAMES:
        try:
            found.append(implementation(name, device))
        except UserError as error:
            missing[name] = error.problem
    return found, missing


def _checked_version(name: str, package: _Package) -> str:
    try:
        found = version(package.distribution)
    except PackageNotFoundError as error:
        raise UserError(f"{name}: {package.distribution} is not installed", package.install) from error
    if found.partition(".")[0] != str(package.major):
        raise UserError(
            f"{name}: got {package.distribution} {found}, expected version {package.major}", package.install
        )
    return found


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _per_sequence(q: Tensor, k: Tensor, v: Tensor, where: Sequences) -> Tensor:
    """A call for each sequence: torch has no varlen kernel for CPUs."""
    parts = zip(*(x.split(list(where.lengths)) for x in (q, k, v)), strict=True)
    return torch.cat([_sdpa(*(x[None] for x in part))[0] for part in parts])


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, where: Sequences) -> Tensor:
    # not at the top: the module registers CUDA operators
    from torch.nn.attention.varlen import varlen_attn

    longest = max(where.lengths)
    causal = (-1, 0)
    out = varlen_attn(q, k, v, where.offsets, where.offsets, longest, longest, window_size=causal)
    assert isinstance(out, Tensor)
    return out


def _packaged(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _first(function(q, k, v, causal=True))


def _packaged_varlen(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, where: Sequences) -> Tensor:
    longest = max(where.lengths)
    # by keyword: the order of the optional ones differs between the packages
    return _first(
        function(
            q,
            k,
            v,
            cu_seqlens_q=where.offsets,
            cu_seqlens_k=where.offsets,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
        )
    )


def _first(out: Any) -> Tensor:
    """The output; some versions return the log-sum-exp beside it."""
    tensor = out[0] if isinstance(out, tuple) else out
    assert isinstance(tensor, Tensor)
    return tensor
