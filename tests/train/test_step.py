"""A step that cannot be right is refused; what it reports is what was computed."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu_dist.batch import JaggedBatch
from hstu_dist.commands.session import Session
from hstu_dist.data.split import Split
from hstu_dist.distributed.process_group import process_group
from hstu_dist.losses.softmax import softmax_loss
from hstu_dist.models.flops import Workload
from hstu_dist.train import step as step_module
from hstu_dist.train.step import TrainStep
from tests.distributed.cases import build, snapshot, tiny_config, whole
from tests.distributed.ranks import run_ranks
from tests.train.cases import WORLD


def work_of(batch: JaggedBatch) -> Workload:
    return Workload.causal(batch.lengths.tolist())


def step_of(data: Path, *overrides: str) -> tuple[Session, TrainStep]:
    session = build(tiny_config(data, Path("unused"), *overrides), WORLD)
    step = TrainStep(session.recommender, session.config.loss, session.optimizers, WORLD, session.config.seed)
    return session, step


@pytest.mark.parametrize("loss", ["sampled_softmax", "full_softmax"])
def test_the_first_loss_is_that_of_the_objective(loss: str, tiny_data: Path) -> None:
    session, step = step_of(tiny_data, f"loss={loss}", "model.dropout=0")
    batch = next(session.loader(Split.TRAIN).epoch(0))
    result = step(batch, work_of(batch), (0, 16))
    assert result.work == work_of(batch) and result.learning_rate == pytest.approx(1e-3)
    # untrained, every candidate looks alike but for scores of spread 1 / (tau * sqrt(width))
    candidates = 9 if loss == "sampled_softmax" else 40
    assert math.log(candidates) < result.loss_sum / batch.num_tokens < math.log(candidates) + 25


def test_repeating_a_step_from_the_same_state_repeats_its_loss(tiny_data: Path) -> None:
    losses = []
    for _ in range(2):
        session, step = step_of(tiny_data)
        batches = session.loader(Split.TRAIN).epoch(0)
        losses.append([step(batch, work_of(batch), (i, 16)).loss_sum for i, batch in enumerate(batches)])
    assert losses[0] == losses[1] and len(losses[0]) == 8


def tensors_of(session: Session) -> dict[str, torch.Tensor]:
    return {name: whole(value) for name, value in session.tensors().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("clip_norm", ["null", "1.0"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float, clip_norm: str, tiny_data: Path) -> None:
    session, step = step_of(tiny_data, f"optimizer.clip_norm={clip_norm}")
    first, second = list(session.loader(Split.TRAIN).epoch(0))[:2]
    step(first, work_of(first), (0, 16))
    before = tensors_of(session)
    # the loss is finite, one weight's gradient is not
    weight = session.recommender.tower.get_parameter("position.weight")
    handle = weight.register_hook(lambda gradient: gradient * value)
    result = step(second, work_of(second), (1, 16))
    assert result.refusal is not None and result.refusal.reason == "the gradient is not finite on rank 0"
    assert torch.equal(result.refusal.batch.row_ids, second.row_ids) and result.refusal.work == work_of(second)
    assert result.loss_sum == 0 and result.work == Workload()
    assert same(before, tensors_of(session))
    # and the step is taken as if nothing had been
    handle.remove()
    assert step(second, work_of(second), (1, 16)).refusal is None
    untouched, other = step_of(tiny_data, f"optimizer.clip_norm={clip_norm}")
    for number, batch in enumerate((first, second)):
        other(batch, work_of(batch), (number, 16))
    assert same(tensors_of(session), tensors_of(untouched))


def test_weights_that_are_no_numbers_are_found_by_the_loss(tiny_data: Path) -> None:
    session, step = step_of(tiny_data)
    with torch.no_grad():
        session.recommender.tower.get_parameter("position.weight").fill_(math.nan)
    batch = next(session.loader(Split.TRAIN).epoch(0))
    refusal = step(batch, work_of(batch), (3, 16)).refusal
    assert refusal is not None and refusal.reason == "the loss is not a finite number on rank 0"


def test_what_goes_wrong_once_is_computed_again(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for wrong in (-1, 2):
        session, step = step_of(tiny_data)
        calls = count()

        def loss(*arguments: Any, calls: Any = calls, wrong: int = wrong) -> torch.Tensor:
            return softmax_loss(*arguments) * (math.nan if next(calls) == wrong else 1.0)

        monkeypatch.setattr("hstu_dist.train.step.softmax_loss", loss)
        results = [step(batch, work_of(batch), (i, 16)) for i, batch in enumerate(session.loader(Split.TRAIN).epoch(0))]
        assert all(result.refusal is None for result in results)
        losses.append(([result.loss_sum for result in results], tensors_of(session)))
    assert losses[0][0] == losses[1][0] and same(losses[0][1], losses[1][1])


def refuses_alike(data: Path) -> tuple[list[str | None], float]:
    """On a rank: reasons of three steps, of which rank 1 finds the second wrong, and a sum over the final weights."""
    with process_group("cpu", 60) as world:
        session = build(tiny_config(data, Path("unused")), world)
        step = TrainStep(session.recommender, session.config.loss, session.optimizers, world, session.config.seed)
        weight = session.recommender.tower.get_parameter("position.weight")
        reasons: list[str | None] = []
        for number, batch in zip(range(3), session.loader(Split.TRAIN).epoch(0), strict=False):
            before = snapshot(session)
            true_loss = step_module.softmax_loss
            if number == 1 and world.rank == 1:
                step_module.softmax_loss = lambda *a, true_loss=true_loss: true_loss(*a) * math.nan
            refusal = step(batch, work_of(batch), (number, 16)).refusal
            step_module.softmax_loss = true_loss
            reasons.append(None if refusal is None else refusal.reason)
            assert same(before, snapshot(session)) == (number == 1)
        return reasons, float(weight.detach().double().sum())


@pytest.mark.distributed
def test_all_ranks_refuse_what_one_finds(tiny_data: Path) -> None:
    (first, weight), (second, other) = run_ranks(2, refuses_alike, tiny_data)
    assert first == second == [None, "the loss is not a finite number on rank 1", None] and weight == other
