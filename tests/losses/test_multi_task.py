"""Labels and losses of the heads by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hstu_dist.actions import action_fields
from hstu_dist.losses.config import HeadConfig, MultiTaskConfig
from hstu_dist.losses.multi_task import head_fields, labels_of, multi_task_loss

FIELDS = action_fields({"click": 1, "stars": 3, "played": 20})
HEADS = (
    HeadConfig(name="click", kind="binary", column="click"),
    HeadConfig(name="liked", kind="binary", column="stars", threshold=4, weight=2.0),
    HeadConfig(name="played", kind="regression", column="played", transform="log1p", offset=1.0, scale=2.0, weight=0.5),
    HeadConfig(name="stars", kind="regression", column="stars"),
)


def test_labels_are_read_from_the_action_word() -> None:
    words = torch.tensor([0 | 3 << 1 | 99 << 4, 1 | 5 << 1 | 0 << 4, 1 | 4 << 1 | 7 << 4], dtype=torch.int32)
    labels = labels_of(words, HEADS, head_fields(HEADS, FIELDS))
    assert labels.dtype == torch.float32
    expected = [
        [0, 0, (math.log(100) - 1) / 2, 3],
        [1, 1, -0.5, 5],
        [1, 1, (math.log(8) - 1) / 2, 4],
    ]
    assert torch.allclose(labels, torch.tensor(expected))


def test_the_loss_is_the_weighted_sum_over_events_and_heads() -> None:
    predicted = torch.randn(5, 4, requires_grad=True)
    labels = torch.rand(5, 4).round()
    loss = multi_task_loss(predicted, labels, HEADS)
    p, y = predicted.detach().double(), labels.double()
    by_hand = 0.0
    for k, weight in enumerate((1.0, 2.0, 0.5, 1.0)):
        for e in range(5):
            z = float(p[e, k])
            if k < 2:
                by_hand += weight * (math.log1p(math.exp(-z)) if y[e, k] else math.log1p(math.exp(z)))
            else:
                by_hand += weight * (z - float(y[e, k])) ** 2
    assert float(loss.detach()) == pytest.approx(by_hand, rel=1e-6)
    loss.backward()
    assert predicted.grad is not None and predicted.grad.ne(0).all()


def test_no_event_has_no_loss_but_a_gradient() -> None:
    predicted = torch.empty(0, 4, requires_grad=True)
    loss = multi_task_loss(predicted, torch.empty(0, 4), HEADS)
    loss.backward()
    assert float(loss.detach()) == 0.0 and predicted.grad is not None


def test_a_column_that_the_data_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="head wish: got column wish, the data has click, stars, played"):
        head_fields((HeadConfig(name="wish", kind="binary", column="wish"),), FIELDS)


@pytest.mark.parametrize("heads", [(), (HEADS[0], HEADS[0])])
def test_heads_have_names_of_their_own(heads: tuple[HeadConfig, ...]) -> None:
    with pytest.raises(ValueError, match="expected at least one head, and different names"):
        MultiTaskConfig(heads=heads)
