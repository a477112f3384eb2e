"""Laws are found again from points that lie on them, with noise, seeds and a run that went wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hstu_dist.metrics.prediction import BinaryPredictions, RegressionSums
from hstu_dist.scaling.law import Fit, LogLaw, PowerLaw, fit_law
from hstu_dist.scaling.study import kind_of

COMPUTE = np.geomspace(1e11, 1e14, 8)
TRUE = PowerLaw(floor=4.2, scale=1.5, exponent=0.2, unit=1e12)


def noisy(seed: int, size: float = 2e-3) -> np.ndarray:
    return TRUE.at(COMPUTE) * np.exp(size * np.random.default_rng(seed).standard_normal(8))


def power(fit: Fit) -> PowerLaw:
    assert isinstance(fit.law, PowerLaw)
    return fit.law


@pytest.mark.slow
@pytest.mark.parametrize("floor", [0.01, 1.0, 4.2])
@pytest.mark.parametrize("exponent", [0.08, 0.2, 0.5])
def test_a_power_law_is_found_exactly(floor: float, exponent: float) -> None:
    law = PowerLaw(floor, 1.5, exponent, 1e12)
    found = fit_law("power", COMPUTE, law.at(COMPUTE), resamples=20)
    assert found.r_squared > 0.99999
    assert np.abs(found.law.at(COMPUTE * 10) / law.at(COMPUTE * 10) - 1).max() < 2e-3
    if floor > 0.5:
        assert power(found).floor == pytest.approx(floor, rel=0.02) and power(found).exponent == pytest.approx(
            exponent, rel=0.03
        )


@pytest.mark.slow
def test_the_largest_run_is_predicted_and_lies_in_the_interval() -> None:
    inside = 0
    for seed in range(6):
        values = noisy(seed)
        found = fit_law("power", COMPUTE[:-1], values[:-1], resamples=40)
        low, high = found.interval(COMPUTE[-1:])
        assert found.law.at(COMPUTE[-1:])[0] == pytest.approx(values[-1], rel=0.03)
        inside += bool(low[0] <= TRUE.at(COMPUTE[-1:])[0] <= high[0])
    assert inside >= 3


@pytest.mark.slow
def test_one_run_that_went_wrong_does_not_decide() -> None:
    values = noisy(1, 5e-4)
    values[3] *= 1.2
    found = fit_law("power", COMPUTE, values, resamples=20)
    assert np.abs(found.law.at(COMPUTE) / TRUE.at(COMPUTE) - 1).max() < 0.01


def test_hit_rates_grow_with_the_logarithm() -> None:
    true = LogLaw(0.2, 0.03, 1e12)
    values = true.at(COMPUTE) + 1e-3 * np.random.default_rng(0).standard_normal(8)
    found = fit_law("logarithm", COMPUTE, values, resamples=60)
    assert isinstance(found.law, LogLaw) and found.law.slope == pytest.approx(0.03, abs=1e-3)
    low, high = found.parameter_interval("b")
    assert low <= found.law.slope <= high and high - low < 3e-3


def test_inverses() -> None:
    assert TRUE.compute_for(float(TRUE.at(np.array([3e13]))[0])) == pytest.approx(3e13)
    assert math.isinf(TRUE.compute_for(4.2)) and math.isinf(TRUE.compute_for(4.2 + 1e-200))
    line = LogLaw(0.2, 0.03, 1e12)
    assert line.compute_for(float(line.at(np.array([3e13]))[0])) == pytest.approx(3e13)
    assert math.isinf(LogLaw(0.2, -0.1, 1e12).compute_for(0.3)) and math.isinf(line.compute_for(1e9))


@pytest.mark.slow
def test_the_same_points_give_the_same_intervals() -> None:
    first, again = (fit_law("power", COMPUTE, noisy(0), resamples=20) for _ in range(2))
    assert first == again


def test_three_sizes_are_too_few() -> None:
    with pytest.raises(ValueError, match="got 3 sizes"):
        fit_law("power", np.array([1.0, 2.0, 2.0, 3.0]), np.ones(4))


@pytest.mark.parametrize(
    ("values", "falling"),
    [
        (BinaryPredictions(torch.zeros(2), torch.tensor([True, False]), torch.zeros(2).long()), {"ne", "log_loss"}),
        (RegressionSums(torch.tensor([2.0, 1.0, 1.0, 3.0, 5.0])), {"mse", "mae"}),
    ],
)
def test_of_a_heads_metrics_those_fall_of_which_less_is_better(
    values: BinaryPredictions | RegressionSums, falling: set[str]
) -> None:
    found = set(values.values())
    assert {name for name in found if kind_of(f"head/{name}") == "power"} == falling and found > falling
    assert kind_of("loss") == "power" and kind_of("hr@10") == "logarithm"
