"""A step that cannot be right is refused; what it reports is what was computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_dist.batch import JaggedBatch
from hstu_dist.commands.session import Session
from hstu_dist.data.split import Split
from hstu_dist.distributed.process_group import process_group
from hstu_dist.models.flops import Workload
from hstu_dist.train.step import TrainStep
from tests.distributed.cases import build, snapshot, tiny_config, whole
from tests.distributed.ranks import run_ranks
from tests.train.cases import WORLD


def work_of(batch: JaggedBatch) -> Workload:
    return Workload.causal(batch.lengths.tolist()) + Workload(context=batch.num_context)


def step_of(data: Path, *overrides: str) -> tuple[Session, TrainStep]:
    session = build(tiny_config(data, Path("unused"), *overrides), WORLD)
    config = session.config
    step = TrainStep(session.objective(), session.optimizers, WORLD, config.trainer.micro_batches)
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


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sampled_softmax", "full_softmax"])
def test_context_counts_neither_in_the_loss_nor_in_the_mean(loss: str, tiny_data: Path) -> None:
    def run(trained: torch.Tensor | None) -> tuple[float, torch.Tensor, Workload]:
        session, step = step_of(tiny_data, f"loss={loss}", "model.dropout=0", "embedding.optimizer.kind=sgd")
        batch = replace(next(session.loader(Split.TRAIN).epoch(0)), trained=trained)
        result = step(batch, work_of(batch), (0, 16))
        gradient = session.recommender.tower.get_parameter("position.weight").grad
        assert gradient is not None
        return result.loss_sum, gradient.clone(), result.work

    session, _ = step_of(tiny_data, f"loss={loss}")
    tokens = next(session.loader(Split.TRAIN).epoch(0)).num_tokens
    some = torch.arange(tokens) % 3 == 0
    loss_all, gradient_all, work = run(None)
    loss_true, gradient_true, _ = run(torch.ones(tokens, dtype=torch.bool))
    assert loss_true == loss_all and torch.equal(gradient_true, gradient_all) and work.targets == tokens
    (loss_a, gradient_a, work_a), (loss_b, gradient_b, work_b) = run(some), run(~some)
    assert work_a.targets == int(some.sum()) and work_a.targets + work_b.targets == tokens == work_a.tokens
    assert loss_a + loss_b == pytest.approx(loss_all, rel=1e-5)
    # each is the gradient of a mean over its own targets
    together = (gradient_a * work_a.targets + gradient_b * work_b.targets) / tokens
    torch.testing.assert_close(together, gradient_all, rtol=1e-4, atol=1e-6)
    loss_none, gradient_none, _ = run(torch.zeros(tokens, dtype=torch.bool))
    assert loss_none == 0 and not gradient_none.any()


def tensors_of(session: Session) -> dict[str, torch.Tensor]:
    return {name: whole(value) for name, value in session.tensors().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.slow
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


def _noted(call: Callable[..., None], name: str, calls: list[str]) -> Callable[..., None]:
    def noted(*arguments: Any) -> None:
        calls.append(name)
        call(*arguments)

    return noted


def test_what_goes_wrong_once_is_computed_again(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    accumulate = TrainStep._accumulate
    for wrong in (-1, 2):
        session, step = step_of(tiny_data)
        calls = count()

        def loss(self: TrainStep, *arguments: Any, calls: Any = calls, wrong: int = wrong) -> float:
            return accumulate(self, *arguments) * (math.nan if next(calls) == wrong else 1.0)

        monkeypatch.setattr(TrainStep, "_accumulate", loss)
        table, told = session.optimizers.table, list[str]()
        for name in ("prepare", "take_back"):
            monkeypatch.setattr(table, name, _noted(getattr(table, name), name, told))
        results = [step(batch, work_of(batch), (i, 16)) for i, batch in enumerate(session.loader(Split.TRAIN).epoch(0))]
        assert all(result.refusal is None for result in results)
        losses.append(([result.loss_sum for result in results], tensors_of(session)))
        # fbgemm counts look-ups: the table hears of the second one as of the first
        again = [] if wrong < 0 else ["take_back", "prepare"]
        assert told == ["prepare"] * 3 + again + ["prepare"] * 5 and int(table.step) == 8
    assert losses[0][0] == losses[1][0] and same(losses[0][1], losses[1][1])


def refuses_alike(data: Path) -> tuple[list[str | None], float]:
    """On a rank: reasons of three steps, of which rank 1 finds the second wrong, and a sum over the final weights."""
    with process_group("cpu", 60) as world:
        session = build(tiny_config(data, Path("unused")), world)
        step = TrainStep(session.objective(), session.optimizers, world)
        weight = session.recommender.tower.get_parameter("position.weight")
        reasons: list[str | None] = []
        for number, batch in zip(range(3), session.loader(Split.TRAIN).epoch(0), strict=False):
            before = snapshot(session)
            true_loss = TrainStep._accumulate
            if number == 1 and world.rank == 1:
                TrainStep._accumulate = lambda *a, true_loss=true_loss: true_loss(*a) * math.nan  # type: ignore
            refusal = step(batch, work_of(batch), (number, 16)).refusal
            TrainStep._accumulate = true_loss  # type: ignore[method-assign]
            reasons.append(None if refusal is None else refusal.reason)
            assert same(before, snapshot(session)) == (number == 1)
        return reasons, float(weight.detach().double().sum())


@pytest.mark.distributed
def test_all_ranks_refuse_what_one_finds(tiny_data: Path) -> None:
    (first, weight), (second, other) = run_ranks(2, refuses_alike, tiny_data)
    assert first == second == [None, "the loss is not a finite number on rank 1", None] and weight == other


class Kept:
    """Bytes that autograd holds for backwards, now and at most."""

    now = most = 0


class Saved:
    """A tensor that waits for its backward, counted until it is let go."""

    def __init__(self, tensor: Tensor, kept: Kept) -> None:
        self.tensor, self.kept = tensor, kept
        kept.now += tensor.nbytes
        kept.most = max(kept.most, kept.now)

    def __del__(self) -> None:
        self.kept.now -= self.tensor.nbytes


def test_parts_keep_the_activations_of_one(tiny_data: Path) -> None:
    most = {}
    for parts in (1, 8):
        session, step = step_of(tiny_data, "trainer.global_batch_size=60", f"trainer.micro_batches={parts}")
        batch = next(session.loader(Split.TRAIN).epoch(0))
        assert batch.num_sequences == 60
        kept = Kept()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: Saved(x, kept), lambda saved: saved.tensor):
            step(batch, work_of(batch), (0, 16))
        most[parts] = kept.most
        assert kept.now == 0
    # the weights that a backward needs are kept by a part of any size
    assert most[8] < most[1] / 5, most
