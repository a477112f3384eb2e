"""NE by hand, AUC and GAUC against all pairs, and parts that merge to the whole."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_dist.metrics.prediction import BinaryPredictions, RegressionSums, areas

# few scores, so that ties are frequent
events = st.lists(st.tuples(st.integers(-2, 2), st.booleans(), st.integers(0, 3)), min_size=2, max_size=24)


def slow_auc(scores: list[float], labels: list[bool]) -> float | None:
    """Share of (positive, negative) pairs in order; ties count half."""
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a, positive in zip(scores, labels, strict=True)
        for b, other in zip(scores, labels, strict=True)
        if positive and not other
    ]
    return sum(pairs) / len(pairs) if pairs else None


def predictions_of(rows: list[tuple[int, bool, int]]) -> BinaryPredictions:
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    logits, labels, groups = columns
    return BinaryPredictions(
        torch.tensor(logits, dtype=torch.float32),
        torch.tensor(labels, dtype=torch.bool),
        torch.tensor(groups, dtype=torch.int64),
    )


@settings(max_examples=200, deadline=None)
@given(rows=events)
def test_areas_are_those_of_all_pairs(rows: list[tuple[int, bool, int]]) -> None:
    whole = slow_auc([r[0] for r in rows], [r[1] for r in rows])
    if whole is None:
        with pytest.raises(ValueError, match="expected both classes: NE is undefined"):
            predictions_of(rows).values()
        return
    values = predictions_of(rows).values()
    assert values["auc"] == pytest.approx(whole, rel=1e-14)
    total = weights = 0.0
    for group in {r[2] for r in rows}:
        mine = [r for r in rows if r[2] == group]
        area = slow_auc([r[0] for r in mine], [r[1] for r in mine])
        if area is not None:
            total, weights = total + area * len(mine), weights + len(mine)
    assert values.get("gauc") == (pytest.approx(total / weights, rel=1e-14) if weights else None)


@settings(max_examples=50, deadline=None)
@given(rows=events, cut=st.integers(0, 24))
def test_parts_merge_to_the_whole_exactly(rows: list[tuple[int, bool, int]], cut: int) -> None:
    if len({label for _, label, _ in rows}) == 1:
        return
    merged = BinaryPredictions.empty(torch.device("cpu"))
    # in another order, as ranks give it
    for part in (rows[cut:], rows[:cut]):
        merged += predictions_of(part)
    whole, found = predictions_of(rows).values(), merged.values()
    assert (found["auc"], found.get("gauc")) == (whole["auc"], whole.get("gauc"))
    assert found == pytest.approx(whole, rel=1e-12)


def test_normalised_entropy_by_hand() -> None:
    logits = [0.0, math.log(3), -math.log(4)]
    values = predictions_of([(0, True, 0), (0, False, 0), (0, False, 0)])
    values = BinaryPredictions(torch.tensor(logits), values.labels, values.groups).values()
    log_loss = -(math.log(1 / 2) + math.log(1 - 3 / 4) + math.log(1 - 1 / 5)) / 3
    entropy = -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3
    assert values["log_loss"] == pytest.approx(log_loss, rel=1e-6)
    assert values["ne"] == pytest.approx(log_loss / entropy, rel=1e-6)
    # predicting the share itself says nothing more
    share = torch.full((3,), math.log(1 / 2), dtype=torch.float64)
    same = BinaryPredictions(share, torch.tensor([True, False, False]), torch.zeros(3, dtype=torch.int64)).values()
    assert same["ne"] == pytest.approx(1.0, rel=1e-12) and same["auc"] == 0.5


def test_pairs_beyond_32_bits_are_counted_exactly() -> None:
    n = 200_000
    area, sizes = areas(torch.arange(n), torch.arange(n) >= n // 2, torch.zeros(n, dtype=torch.int64))
    assert area.tolist() == [1.0] and sizes.tolist() == [n]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_predictions_that_are_no_numbers_are_refused(value: float) -> None:
    bad = BinaryPredictions(torch.tensor([value, 1.0]), torch.tensor([True, False]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="got 1 of 2 that are no numbers"):
        bad.values()
    with pytest.raises(ValueError, match="no number"):
        RegressionSums.of(torch.tensor([value, 1.0]), torch.tensor([1.0, 2.0])).values()


def test_regression_by_hand() -> None:
    predicted, labels = torch.tensor([1.0, 2.0, 5.0, 3.0]), torch.tensor([2.0, 2.0, 4.0, 4.0])
    values = RegressionSums.of(predicted, labels).values()
    assert values == pytest.approx({"mse": 3 / 4, "mae": 3 / 4, "r2": 1 - (3 / 4) / 1.0})
    parts = RegressionSums.empty(torch.device("cpu"))
    for part in (slice(0, 1), slice(1, 4)):
        parts += RegressionSums.of(predicted[part], labels[part])
    assert parts.values() == pytest.approx(values, rel=1e-14)


def test_equal_labels_and_no_prediction_are_named() -> None:
    with pytest.raises(ValueError, match="got 2 equal ones, expected different ones: R² is undefined"):
        RegressionSums.of(torch.tensor([1.0, 2.0]), torch.tensor([3.3, 3.3])).values()
    with pytest.raises(ValueError, match="got no prediction"):
        RegressionSums.empty(torch.device("cpu")).values()
    with pytest.raises(ValueError, match="got 0 positives of 0"):
        BinaryPredictions.empty(torch.device("cpu")).values()
