"""Learning-rate schedule, clipping, and the optimizer state that a checkpoint holds."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from torch import nn

from hstu_dist.distributed.table_optimizer import TableOptimizer
from hstu_dist.train.config import OptimizerConfig, ScheduleConfig
from hstu_dist.train.optimizer import Optimizers, schedule_factor


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"kind": "constant"}, [1.0] * 9),
        ({"kind": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ({"kind": "linear"}, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]),
        (
            {"kind": "linear", "final_factor": 0.5, "warmup_steps": 2},
            [0.5, 1, 1, 11 / 12, 10 / 12, 0.75, 8 / 12, 7 / 12, 0.5],
        ),
        ({"kind": "cosine"}, [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(9)]),
        ({"kind": "cosine", "warmup_steps": 9}, [(i + 1) / 9 for i in range(9)]),
    ],
    ids=str,
)
def test_schedule(schedule: dict[str, Any], expected: list[float]) -> None:
    config = ScheduleConfig(**schedule)
    assert [schedule_factor(config, step, 9) for step in range(9)] == pytest.approx(expected)
    # a run that was lengthened and shortened again stays at the end
    assert schedule_factor(config, 20, 9) == pytest.approx(config.final_factor if config.kind != "constant" else 1.0)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_shortest_run_has_a_schedule(kind: Any) -> None:
    assert 0 <= schedule_factor(ScheduleConfig(kind=kind), 0, 1) <= 1


def optimizers_of(**settings: Any) -> tuple[nn.Linear, Optimizers, Mock]:
    dense, table = nn.Linear(3, 2), Mock(TableOptimizer)
    return dense, Optimizers(dense, table, OptimizerConfig(learning_rate=0.1, **settings)), table


def test_both_learning_rates_follow_the_schedule() -> None:
    dense, optimizers, table = optimizers_of(schedule=ScheduleConfig(kind="linear", warmup_steps=2))
    dense.weight.grad = torch.ones_like(dense.weight)
    factors = [optimizers.prepare(step, 5) for step in range(5)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    assert table.prepare.call_args_list == [call(factor) for factor in factors]
    assert optimizers.dense.param_groups[0]["lr"] == pytest.approx(0.0)
    assert dense.weight.grad is None


def test_step_is_adamw() -> None:
    dense, optimizers, _ = optimizers_of(weight_decay=0.5, eps=1e-6)
    before = dense.weight.detach().clone()
    for parameter in dense.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizers.step()
    # the first step of Adam has length lr; decay is decoupled from it
    assert torch.allclose(dense.weight, before * (1 - 0.1 * 0.5) - 0.1, atol=1e-6)


def test_clipping_bounds_the_global_norm() -> None:
    dense, optimizers, _ = optimizers_of(clip_norm=0.5)
    for parameter in dense.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizers.step()
    gradients = [parameter.grad for parameter in dense.parameters() if parameter.grad is not None]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_any_element_that_is_not_finite_is_found(value: float) -> None:
    dense, optimizers, table = optimizers_of()
    for parameter in dense.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert optimizers.is_finite()
    assert dense.weight.grad is not None
    dense.weight.grad[1, 2] = value
    assert not optimizers.is_finite()
    optimizers.take_back()
    assert table.take_back.call_count == 1


def test_state_exists_before_the_first_step_and_is_the_optimizer_s_own() -> None:
    dense, optimizers, _ = optimizers_of()
    fresh = optimizers.state_tensors()
    assert set(fresh) == {f"{n}.{s}" for n in ("weight", "bias") for s in ("step", "exp_avg", "exp_avg_sq")}
    assert not any(value.any() for value in fresh.values())
    for parameter in dense.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step()
    after = optimizers.state_tensors()
    # loading fills these tensors in place
    assert all(after[name] is value for name, value in fresh.items())
    assert float(after["weight.step"]) == 1.0 and after["weight.exp_avg"].all()
