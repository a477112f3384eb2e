"""Ranking towers: nothing sees its own action or the future, everything before matters, edge batches survive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hstu_dist.actions import ActionField, action_fields
from hstu_dist.models.dlrm import means_before
from hstu_dist.models.ranking import field_levels
from hstu_dist.models.ranking_shape import counts_by_magnitude
from hstu_dist.ops import backends
from tests.models.ranking_cases import ENCODERS, MAX_EVENTS, MODELS, WIDTH, ranking_batch, tower_of, words_of
from tests.ops.cases import offsets_of

models = pytest.mark.parametrize("model", MODELS)
BACKENDS = [str(backend) for backend in backends.available(torch.device("cpu"))]
# rows of the second of three sequences
FIRST, LENGTH = 4, MAX_EVENTS
PERTURBED = 5


def towers() -> list[tuple[str, str]]:
    return [*((name, backend) for name in ENCODERS for backend in BACKENDS), ("dlrm", ""), ("dlrm_cross", "")]


@pytest.mark.parametrize(("model", "backend"), towers())
def test_no_prediction_sees_its_own_action_or_the_future(model: str, backend: str) -> None:
    config = replace(MODELS[model], backend=backend) if backend else MODELS[model]
    tower = tower_of(config)
    before = ranking_batch([FIRST, LENGTH, 6])
    items = torch.randn(before.num_tokens, WIDTH)
    event = FIRST + PERTURBED
    # the event's own action, and everything of the events after it: items, actions, times
    later = torch.zeros(before.num_tokens, dtype=torch.bool)
    later[event + 1 : FIRST + LENGTH] = True
    own_or_later = later.clone()
    own_or_later[event] = True
    after = replace(
        before,
        actions=torch.where(own_or_later, words_of(before.num_tokens, seed=9), before.actions),
        timestamps=before.timestamps + later * 9_999_999,
        query_times=before.query_times + own_or_later * 77_777_777,
        target_ids=before.target_ids + own_or_later,
    )
    assert (after.actions != before.actions)[own_or_later].all()
    other_items = items + later[:, None] * torch.randn_like(items)
    a, b = tower(items, before, None), tower(other_items, after, None)
    assert torch.equal(a[~later], b[~later])
    assert (a[later] != b[later]).any(dim=1).all()


@models
def test_an_earlier_action_changes_every_later_prediction_of_its_user_alone(model: str) -> None:
    tower = tower_of(MODELS[model])
    before = ranking_batch([FIRST, LENGTH, 6])
    items = torch.randn(before.num_tokens, WIDTH)
    event = FIRST + PERTURBED
    changed = torch.arange(before.num_tokens) == event
    after = replace(before, actions=torch.where(changed, before.actions ^ 0b1111, before.actions))
    a, b = tower(items, before, None), tower(items, after, None)
    seeing = torch.zeros(before.num_tokens, dtype=torch.bool)
    seeing[event + 1 : FIRST + LENGTH] = True
    assert torch.equal(a[~seeing], b[~seeing])
    assert (a[seeing] != b[seeing]).any(dim=1).all()


@models
@pytest.mark.parametrize("feature", [0, 1])
def test_a_contextual_feature_changes_the_predictions_of_its_user_alone(model: str, feature: int) -> None:
    tower = tower_of(MODELS[model])
    before = ranking_batch([3, 5])
    items = torch.randn(8, WIDTH)
    assert before.contextual is not None
    codes = before.contextual.clone()
    codes[1, feature] = (codes[1, feature] + 1) % 3
    a, b = tower(items, before, None), tower(items, replace(before, contextual=codes), None)
    assert torch.equal(a[:3], b[:3]) and (a[3:] != b[3:]).any(dim=1).all()


@models
def test_unknown_contextual_values_share_one_row(model: str) -> None:
    tower = tower_of(MODELS[model])
    batch, items = ranking_batch([4]), torch.randn(4, WIDTH)
    outputs = []
    for code in (-1, 50, 10**9):
        outputs.append(tower(items, replace(batch, contextual=torch.tensor([[code, 0]])), None))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_missing_contextual_features_are_named() -> None:
    tower, batch, items = tower_of(MODELS["hstu"]), ranking_batch([4]), torch.randn(4, WIDTH)
    with pytest.raises(ValueError, match="got no contextual features, expected 2"):
        tower(items, replace(batch, contextual=None), None)
    with pytest.raises(ValueError, match="got 1 features, expected 2"):
        tower(items, replace(batch, contextual=torch.zeros(1, 1, dtype=torch.int64)), None)


@models
def test_a_gradient_reaches_every_parameter_and_following_it_helps(model: str) -> None:
    tower = tower_of(MODELS[model])
    batch = ranking_batch([MAX_EVENTS, 3, 0, 8, 1])
    items = torch.randn(batch.num_tokens, WIDTH, requires_grad=True)
    wanted = torch.randn(batch.num_tokens, 3)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-2)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        loss = ((tower(items, batch, step) - wanted) ** 2).mean()
        loss.backward()
        for name, parameter in tower.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), f"{name}: no gradient reaches it"
        losses.append(float(loss.detach()))
        optimizer.step()
    assert items.grad is not None and items.grad.abs().sum(1).gt(0).all()
    assert losses[-1] < losses[0]


@models
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (0, 1, 2)], ids=str)
def test_batches_with_nothing_in_them(model: str, lengths: tuple[int, ...]) -> None:
    tower = tower_of(MODELS[model])
    batch = ranking_batch(lengths)
    items = torch.randn(batch.num_tokens, WIDTH, requires_grad=True)
    out = tower(items, batch, 1)
    assert out.shape == (batch.num_tokens, 3) and out.isfinite().all()
    out.sum().backward()
    for name, parameter in tower.named_parameters():
        # None would leave the ranks of a data-parallel group waiting for each other
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@models
def test_dropout_is_off_in_evaluation_and_random_in_training(model: str) -> None:
    tower = tower_of(MODELS[model])
    batch, items = ranking_batch([9, 4]), torch.randn(13, WIDTH)
    assert torch.equal(tower(items, batch, None), tower(items, batch, None))
    assert torch.equal(tower(items, batch, 3), tower(items, batch, 3))
    assert not torch.equal(tower(items, batch, 3), tower(items, batch, 4))
    assert not torch.equal(tower(items, batch, 3), tower(items, batch, None))


def test_means_before_are_those_of_a_slow_loop() -> None:
    x, lengths = torch.randn(9, 2), (3, 0, 5, 1)
    expected = []
    for start, length in zip(offsets_of(lengths).tolist(), lengths, strict=False):
        for i in range(length):
            rows = x[start : start + i]
            expected.append(rows.mean(0) if i else torch.zeros(2))
    assert torch.allclose(means_before(x, offsets_of(lengths)), torch.stack(expected), atol=1e-7)


def test_levels_are_values_or_their_orders_of_magnitude() -> None:
    stars, played = action_fields({"stars": 3, "played": 20})
    words = torch.tensor([0, 5, 7]) | (torch.tensor([0, 1, 1023]) << 3)
    assert not counts_by_magnitude(stars, 8) and counts_by_magnitude(played, 8)
    assert field_levels(stars, words, 8).tolist() == [0, 5, 7]
    assert field_levels(played, words, 8).tolist() == [0, 1, 10]
    largest = torch.tensor([played.largest << 3])
    assert field_levels(played, largest, 8).tolist() == [20]
    # a whole word is one plain number
    assert not counts_by_magnitude(action_fields({})[0], 16)


def test_action_words_pack_and_unpack() -> None:
    fields = action_fields({"a": 1, "b": 30})
    assert fields == (ActionField("a", 0, 1), ActionField("b", 1, 30))
    word = torch.tensor([1 | (123 << 1)], dtype=torch.int32)
    assert [int(field.of(word)) for field in fields] == [1, 123]
    with pytest.raises(ValueError, match="32 bits together, expected at most 31"):
        action_fields({"a": 2, "b": 30})
    with pytest.raises(ValueError, match="a: got 0 bits"):
        action_fields({"a": 0})
