"""A step that cannot be right is refused; what it reports is what was computed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hstu_dist.batch import JaggedBatch
from hstu_dist.commands.session import Session
from hstu_dist.data.split import Split
from hstu_dist.errors import UserError
from hstu_dist.models.flops import Workload
from hstu_dist.train.step import TrainStep
from tests.distributed.cases import build, tiny_config
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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused_before_anything_is_updated(value: float, tiny_data: Path) -> None:
    session, step = step_of(tiny_data)
    with torch.no_grad():
        session.recommender.tower.get_parameter("position.weight")[0, 0] = value
    before = {name: tensor.clone() for name, tensor in session.recommender.tower.state_dict().items()}
    batch = next(session.loader(Split.TRAIN).epoch(0))
    with pytest.raises(UserError, match="step 3: the loss is nan on rank 0") as caught:
        step(batch, work_of(batch), (3, 16))
    assert "learning rates" in caught.value.remedy
    after = session.recommender.tower.state_dict()
    assert all(
        torch.equal(
            after[name],
            tensor,
        )
        or name == "position.weight"
        for name, tensor in before.items()
    )


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
