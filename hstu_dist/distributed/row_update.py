"""The update of touched table rows by each optimizer, written out in plain PyTorch.

A rule sees only rows that a step touched, gathered into small tensors of float32, and changes them in place. Shapes:
N ids looked up by all ranks, U distinct ones, D stored width of a row. Of D elements the last may be padding, whose
gradient is zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hstu_dist.distributed.config import TableOptimizerConfig
from hstu_dist.ops.random import TokenNoise, fold

_CHUNK_ELEMENTS = 1 << 16
"""Elements updated at a time: few enough for the tensors of several passes to stay in cache."""


@dataclass(frozen=True)
class Moment:
    """Where training stands.

    Attributes:
        learning_rate: of this step, schedule included.
        step: number of this step, from 1: bias correction depends on it.
    """

    learning_rate: float
    step: int


class RowRule(Protocol):
    """One optimizer."""

    def new_state(self, weight_RD: Tensor) -> dict[str, Tensor]:
        """Zeros [R] or [R, D] float32, by the names that TorchRec gives the state of fbgemm's optimizers."""

    def update(self, rows_UD: Tensor, gradient_UD: Tensor, state: Mapping[str, Tensor], moment: Moment) -> None:
        """Changes rows and state in place; `state` is that of `new_state`, at the same rows."""


@dataclass(frozen=True)
class SGD:
    """Plain gradient descent."""

    def new_state(self, weight_RD: Tensor) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def update(self, rows_UD: Tensor, gradient_UD: Tensor, state: Mapping[str, Tensor], moment: Moment) -> None:
        """Subtracts the scaled gradient."""
        rows_UD.sub_(gradient_UD, alpha=moment.learning_rate)


@dataclass(frozen=True)
class RowwiseAdagrad:
    """Adagrad with one accumulator a row: the sum of its mean squared gradients.

    Attributes:
        width: elements of a row without padding.
        eps: added to the root.
    """

    width: int
    eps: float

    def new_state(self, weight_RD: Tensor) -> dict[str, Tensor]:
        """The accumulator, [R]."""
        return {"momentum1": _zeros(weight_RD[:, 0])}

    def update(self, rows_UD: Tensor, gradient_UD: Tensor, state: Mapping[str, Tensor], moment: Moment) -> None:
        """Adds to the accumulator, then divides the gradient by its root."""
        total_U = state["momentum1"].add_(_mean_square(gradient_UD, self.width))
        rows_UD.addcdiv_(gradient_UD, (total_U.sqrt() + self.eps)[:, None], value=-moment.learning_rate)


@dataclass(frozen=True)
class AdamW:
    """AdamW that is lazy: a row decays, and its moments fade, only in steps that touch it.

    Attributes:
        width: elements of a row without padding.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        rowwise: the second moment is one mean of squares a row, not one square an element.
    """

    width: int
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    rowwise: bool

    def new_state(self, weight_RD: Tensor) -> dict[str, Tensor]:
        """The first moment [R, D] and the second, [R] or [R, D]."""
        second = weight_RD[:, 0] if self.rowwise else weight_RD
        return {"momentum1": _zeros(weight_RD), "exp_avg_sq": _zeros(second)}

    def update(self, rows_UD: Tensor, gradient_UD: Tensor, state: Mapping[str, Tensor], moment: Moment) -> None:
        """The update of torch.optim.AdamW, with the bias correction of the table's step."""
        beta1, beta2 = self.betas
        mean_UD = state["momentum1"].lerp_(gradient_UD, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2)
        if self.rowwise:
            square = square.add_(_mean_square(gradient_UD, self.width), alpha=1 - beta2)[:, None]
        else:
            square.addcmul_(gradient_UD, gradient_UD, value=1 - beta2)
        root = square.sqrt().div_(math.sqrt(1 - beta2**moment.step)).add_(self.eps)
        rows_UD.mul_(1 - moment.learning_rate * self.weight_decay)
        rows_UD.addcdiv_(mean_UD, root, value=-moment.learning_rate / (1 - beta1**moment.step))


def row_rule(config: TableOptimizerConfig, width: int) -> RowRule:
    """The rule of a configuration, for rows of `width` elements without padding."""
    if config.kind == "sgd":
        return SGD()
    assert config.eps is not None
    if config.kind == "rowwise_adagrad":
        return RowwiseAdagrad(width, config.eps)
    assert config.betas is not None
    assert config.weight_decay is not None
    return AdamW(width, config.betas, config.eps, config.weight_decay, rowwise=config.kind == "rowwise_adamw")


@dataclass(frozen=True)
class Rows:
    """Rows of a table that are updated in one place.

    Attributes:
        weight: [R, D], in any floating-point dtype.
        state: of all rows, from `RowRule.new_state`.
        key: of the random numbers by which updates of rows shorter than float32 are rounded.
        first: (row, column) of the whole table that these rows begin at; the numbers depend on it.
    """

    weight: Tensor
    state: Mapping[str, Tensor]
    key: int = 0
    first: tuple[int, int] = (0, 0)


def update_rows(rule: RowRule, table: Rows, lookup: tuple[Tensor, Tensor], moment: Moment) -> None:
    """Updates the rows of a lookup in place; gradients of the same row are added up first.

    Args:
        rule: the optimizer.
        table: the rows.
        lookup: (ids [N] int64 in any order, gradient [N, D] of each).
        moment: learning rate and number of the step.
    """
    rows_U, gradient_UD = coalesce(*lookup)
    chunk = max(1, _CHUNK_ELEMENTS // table.weight.shape[1])
    for start in range(0, rows_U.numel(), chunk):
        _update_chunk(rule, table, (rows_U[start : start + chunk], gradient_UD[start : start + chunk]), moment)


def _update_chunk(rule: RowRule, table: Rows, distinct: tuple[Tensor, Tensor], moment: Moment) -> None:
    rows_u, gradient_uD = distinct
    tensors = {"weight": table.weight, **table.state}
    first, last = int(rows_u[0]), int(rows_u[-1])
    # ascending without a gap, as when negatives cover a small table: no need to gather and scatter
    in_place = last - first == rows_u.numel() - 1
    if in_place:
        touched = {name: tensor[first : last + 1] for name, tensor in tensors.items()}
    else:
        touched = {name: tensor.index_select(0, rows_u) for name, tensor in tensors.items()}
    stored = touched["weight"]
    rows = stored.float()
    rule.update(rows, gradient_uD, touched, moment)
    if stored.dtype != torch.float32:
        row, column = table.first
        noise = TokenNoise(fold(table.key, moment.step), rows_u + row)
        words_uD = noise.words(column + rows.shape[1])[:, column:]
        stored.copy_(stochastic_round(rows, stored.dtype, words_uD))
    if not in_place:
        for name, tensor in tensors.items():
            tensor.index_copy_(0, rows_u, touched[name])


def stochastic_round(x_UD: Tensor, dtype: torch.dtype, words_UD: Tensor) -> Tensor:
    """Rounds up or down at random, in proportion to the distance: the mean of an update survives, however small it is.

    Args:
        x_UD: [U, D] float32.
        dtype: float16 or bfloat16.
        words_UD: [U, D] int32, all values equally likely.

    Returns:
        Values of `dtype`; beyond its largest value, that value.
    """
    limits = torch.finfo(dtype)
    exponent = torch.frexp(x_UD)[1] - 1
    # below the smallest normal number the spacing stays the same
    spacing = torch.ldexp(torch.full_like(x_UD, limits.eps), exponent.clamp(min=math.frexp(limits.tiny)[1] - 1))
    # 13 bits: a float16 has as many fewer than a float32, so every fraction is met exactly as often as it should be
    uniform_UD = (words_UD >> 19).bitwise_and_(0x1FFF).float().div_(1 << 13)
    rounded = (x_UD / spacing + uniform_UD).floor_().mul_(spacing)
    return rounded.clamp_(limits.min, limits.max).to(dtype)


def coalesce(ids_N: Tensor, gradient_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids [U], ascending, and the sum [U, D] of the gradients of each, added in the order of the lookup."""
    if bool((ids_N[1:] > ids_N[:-1]).all()):
        return ids_N, gradient_ND
    rows_U, places_N = ids_N.unique(return_inverse=True)
    total_UD = gradient_ND.new_zeros(rows_U.numel(), gradient_ND.shape[1])
    return rows_U, total_UD.index_add_(0, places_N, gradient_ND)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device)


def _mean_square(gradient_UD: Tensor, width: int) -> Tensor:
    return gradient_UD.square().sum(dim=1).div_(width)
