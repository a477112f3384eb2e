"""Balancing: exact on paper cases, at the bound of the largest sequence or below 3%, and never worse than turns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_dist.data.balance import (
    CostLaw,
    by_cost,
    by_cost_and_count,
    imbalance,
    in_turns,
    largest_item_bound,
)
from hstu_dist.data.synthetic import power_law

COSTS = st.lists(st.floats(0.5, 1000), min_size=0, max_size=40).map(np.array)


def least_imbalance(costs: np.ndarray, ranks: int) -> float:
    """By trying every assignment."""
    owners = itertools.product(range(ranks), repeat=len(costs))
    return min(imbalance(costs, np.array(each), ranks) for each in owners)


def test_cost_is_the_law() -> None:
    law = CostLaw(linear=3.0, quadratic=0.5)
    assert law.of(np.array([0, 1, 10])).tolist() == [0.0, 3.5, 80.0]
    assert CostLaw().of(np.array([7])).tolist() == [7.0]


def test_costliest_first_to_the_idlest() -> None:
    costs = np.array([1.0, 5.0, 4.0, 3.0, 3.0])
    assert by_cost(costs, 2).tolist() == [1, 0, 1, 1, 0]
    assert in_turns(np.ones(5), 2).tolist() == [0, 1, 0, 1, 0]
    # the long one alone, the short ones together; with equal counts it must have company
    long = np.array([1.0, 1.0, 1.0, 9.0])
    assert by_cost(long, 2).tolist() == [1, 1, 1, 0]
    assert sorted(by_cost_and_count(long, 2).tolist()) == [0, 0, 1, 1]


@settings(max_examples=60, deadline=None)
@given(costs=COSTS, ranks=st.integers(1, 9))
def test_counts_are_equal_where_wanted_and_nothing_is_below_the_bound(costs: np.ndarray, ranks: int) -> None:
    bound = largest_item_bound(costs, ranks)
    for balance in (by_cost, by_cost_and_count):
        owners = balance(costs, ranks)
        assert len(owners) == len(costs) and ((owners >= 0) & (owners < ranks)).all()
        assert imbalance(costs, owners, ranks) >= bound - 1e-9
    counts = np.bincount(by_cost_and_count(costs, ranks), minlength=ranks)
    assert counts.max() - counts.min() <= 1


@settings(max_examples=30, deadline=None)
@given(costs=st.lists(st.floats(0.5, 10), min_size=1, max_size=7).map(np.array), ranks=st.integers(1, 3))
def test_within_a_third_of_the_best_assignment(costs: np.ndarray, ranks: int) -> None:
    # Graham's bound of this rule: 4/3 - 1/(3 ranks)
    best = 1 + least_imbalance(costs, ranks)
    assert 1 + imbalance(costs, by_cost(costs, ranks), ranks) <= best * (4 / 3) + 1e-9


@pytest.mark.parametrize("sequences_per_rank", [32, 128])
@pytest.mark.parametrize("quadratic", [0.0, 1 / 2000])
@pytest.mark.parametrize("balance", [by_cost, by_cost_and_count])
def test_64_ranks_with_zipf_lengths(sequences_per_rank: int, quadratic: float, balance: object) -> None:
    law, ranks = CostLaw(linear=1.0, quadratic=quadratic), 64
    for seed in range(3):
        uniform = np.random.default_rng(seed).random(ranks * sequences_per_rank)
        costs = law.of(power_law(uniform, 1.2, (1, 4096)))
        found = imbalance(costs, balance(costs, ranks), ranks)  # type: ignore[operator]
        assert found <= max(0.03, largest_item_bound(costs, ranks) + 1e-9)
        assert imbalance(costs, in_turns(costs, ranks), ranks) > 0.2
