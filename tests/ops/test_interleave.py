"""Interleaving against a loop over sequences."""

from __future__ import annotations

import pytest
import torch

from hstu_dist.ops.interleave import Interleaving
from tests.ops.cases import offsets_of


@pytest.mark.parametrize("lengths", [(), (0,), (3,), (0, 2, 0, 1, 4)], ids=str)
@pytest.mark.parametrize("num_contextual", [0, 1, 3])
def test_tokens_are_those_of_a_slow_loop(lengths: tuple[int, ...], num_contextual: int) -> None:
    B, E = len(lengths), sum(lengths)
    items, actions = torch.arange(E) + 1000, torch.arange(E) + 2000
    contextual = torch.arange(B * num_contextual)
    expected: list[int] = []
    starts: list[int] = []
    event = 0
    for b, length in enumerate(lengths):
        starts.append(len(expected))
        expected += contextual[b * num_contextual : (b + 1) * num_contextual].tolist()
        for _ in range(length):
            expected += [int(items[event]), int(actions[event])]
            event += 1
    tokens = Interleaving.of(offsets_of(lengths), num_contextual)
    merged = tokens.merge(contextual, items, actions)
    assert merged.tolist() == expected
    assert tokens.offsets.tolist() == [*starts, len(expected)]
    assert merged[tokens.items].tolist() == items.tolist()
    assert merged[tokens.actions].tolist() == actions.tolist()


def test_rows_of_a_matrix_move_and_their_gradients_come_back() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    tokens = Interleaving.of(offsets_of((1, 2)), 1)
    merged = tokens.merge(torch.zeros(2, 2), x, 2 * x)
    assert torch.equal(merged[tokens.items], x) and torch.equal(merged[tokens.actions], 2 * x)
    merged.sum().backward()
    assert torch.equal(x.grad, torch.full((3, 2), 3.0))
