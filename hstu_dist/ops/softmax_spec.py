"""What a softmax loss means: its scores and its backend, checked before any memory is touched."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

MASKED = -5e4
"""Score of a negative that equals its positive (the public code's value)."""


class SoftmaxBackend(StrEnum):
    """Implementations of `softmax_loss`; all compute the same loss and gradients."""

    REFERENCE = "reference"
    CHUNKED = "chunked"
    NATIVE = "native"


@dataclass(frozen=True, kw_only=True)
class SoftmaxSpec:
    """Everything about a call that is not a tensor.

    Attributes:
        temperature: tau, what dot products are divided by.
        log_expected_count: logQ correction: log of how many times a negative is expected among the draws of a
            position, R / V for uniform draws from V items. It is subtracted from the scores of negatives, so that
            the sum over R of them estimates the sum over all V. 0: no correction.
        backend: which implementation computes it.
    """

    temperature: float
    log_expected_count: float = 0.0
    backend: SoftmaxBackend = SoftmaxBackend.CHUNKED

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"SoftmaxSpec.temperature: got {self.temperature}, expected a number > 0")


class LossAndGradients(NamedTuple):
    """The sum over positions and its gradients, in the dtype of the queries."""

    loss: Tensor
    queries: Tensor
    items: Tensor


class SoftmaxKernel(Protocol):
    """What a fast backend's module offers; `backends.softmax_kernel` finds it by name."""

    def loss_and_gradients(
        self, queries_TD: Tensor, items_CD: Tensor, positive_T: Tensor, negative_TR: Tensor | None, spec: SoftmaxSpec
    ) -> LossAndGradients:
        """Arguments are those of `softmax_loss`, already checked."""


def check_call(queries: Tensor, items: Tensor, positive: Tensor, negative: Tensor | None) -> None:
    """Checks everything that `softmax_loss` states about its tensors.

    Raises:
        ValueError: names the argument, what was got and what was expected.
    """
    if queries.dim() != 2 or items.dim() != 2 or queries.shape[1] != items.shape[1] or queries.shape[1] == 0:
        raise ValueError(
            f"queries, items: got shapes {list(queries.shape)}, {list(items.shape)}, expected [T, D], [C, D], D > 0"
        )
    if items.dtype != queries.dtype or not queries.is_floating_point():
        raise ValueError(f"items: got {items.dtype} with queries of {queries.dtype}, expected one floating dtype")
    places = {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
    for (name, given), dims in zip(places.items(), (1, 2), strict=False):
        if given.dim() != dims or given.shape[0] != queries.shape[0] or given.dtype != torch.int64:
            wanted = f"{'[T]' if dims == 1 else '[T, R]'} int64, T = {queries.shape[0]}"
            raise ValueError(f"{name}: got shape {list(given.shape)} {given.dtype}, expected {wanted}")
    for name, given in {"queries": queries, "items": items, **places}.items():
        if given.device != queries.device or not given.is_contiguous():
            raise ValueError(
                f"{name}: got strides {given.stride()} on {given.device}, expected contiguous on {queries.device}"
            )
    for name, given in places.items():
        if given.numel():
            low, high = (int(x) for x in given.aminmax())
            if low < 0 or high >= items.shape[0]:
                raise ValueError(f"{name}: got places {low} to {high}, expected rows of items, [0, {items.shape[0]})")
