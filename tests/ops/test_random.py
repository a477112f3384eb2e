"""Random numbers depend on key, token and column only, and look random. All seeds are fixed: nothing here is flaky."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu_dist.ops.random import TokenNoise, fold

NOISE = TokenNoise(fold(11, 22), torch.arange(1 << 14))
# deviations that a statistic may be off: one in a million by chance, and chance was drawn once
SIGMAS = 5.0


def assert_uniform(values: Tensor, bins: int) -> None:
    """Chi-square of bin numbers; its mean is the degrees of freedom f, its variance 2f."""
    expected = values.numel() / bins
    statistic = float(((values.flatten().bincount(minlength=bins) - expected) ** 2 / expected).sum())
    freedom = bins - 1
    assert abs(statistic - freedom) < SIGMAS * (2 * freedom) ** 0.5


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    pair = torch.stack([a.flatten().double(), b.flatten().double()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < SIGMAS / a.numel() ** 0.5


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(
    key=st.integers(-(2**63), 2**63 - 1),
    tokens=st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=40),
    count=st.integers(1, 9),
    data=st.data(),
)
def test_a_token_draws_the_same_wherever_it_is(key: int, tokens: list[int], count: int, data: st.DataObject) -> None:
    whole = TokenNoise(key, torch.tensor(tokens)).words(count)
    order = data.draw(st.permutations(range(len(tokens))))
    share = order[: data.draw(st.integers(0, len(tokens)))]
    part = TokenNoise(key, torch.tensor(tokens)[share])
    assert torch.equal(part.words(count), whole[share])
    # fewer columns are the first columns
    assert torch.equal(part.words(1), whole[share, :1])
    assert torch.equal(part.integers(count, 1000), TokenNoise(key, torch.tensor(tokens)).integers(count, 1000)[share])


def test_values_never_change() -> None:
    """A checkpoint resumed with another version must draw on: these numbers are part of the format."""
    assert fold(1, 2, 3) == 7702586659592502839
    words = TokenNoise(fold(1, 2, 3), torch.tensor([0, 7])).words(2)
    assert words.tolist() == [[862725548, 529836305], [284366332, 1054948381]]


def test_fold_depends_on_every_number_and_their_order() -> None:
    keys = [
        fold(*numbers) for numbers in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 2, 3), (3, 2, 1), (2**63,), (-1,))
    ]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)


@pytest.mark.parametrize("shift", [0, 8, 24])
def test_words_are_uniform_in_high_and_low_bits(shift: int) -> None:
    assert_uniform((NOISE.words(64) >> shift).long() & 255, 256)


def test_streams_keys_tokens_and_columns_are_uncorrelated() -> None:
    draws = {
        "base": NOISE.words(32),
        "stream 0": NOISE.stream(0).words(32),
        "stream 1": NOISE.stream(1).words(32),
        "next key": TokenNoise(fold(11, 23), NOISE.tokens).words(32),
        "next token": NOISE.words(33)[1:],
        "next column": NOISE.words(33)[:, 1:],
    }
    for a, b in combinations(draws.values(), 2):
        assert_uncorrelated(a[: len(NOISE.tokens) - 1, :32], b[: len(NOISE.tokens) - 1, :32])


def test_all_64_bits_of_a_token_count() -> None:
    # with 32 bits about 2^7 pairs of tokens would draw alike
    words = TokenNoise(5, torch.arange(1 << 20)).words(2).long()
    pairs = (words[:, 0] << 32) | (words[:, 1] & 0xFFFFFFFF)
    assert pairs.sort().values.diff().count_nonzero() == pairs.numel() - 1


@pytest.mark.parametrize("high", [1, 7, 1 << 20, (1 << 20) + 1, 1 << 40, 1 << 61])
def test_integers_fill_their_range(high: int) -> None:
    drawn = NOISE.integers(16, high)
    assert drawn.dtype == torch.int64 and drawn.shape == (len(NOISE.tokens), 16)
    assert int(drawn.min()) >= 0 and int(drawn.max()) < high
    if high <= 7:
        assert_uniform(drawn, high) if high > 1 else None
    else:
        assert_uniform((drawn.double() * (64 / high)).long(), 64)
        # bits below the precision of float64 too
        assert_uniform(drawn & 63, 64) if high % 64 == 0 else None


@pytest.mark.parametrize("high", [0, -1, (1 << 61) + 1])
def test_impossible_ranges_are_refused(high: int) -> None:
    with pytest.raises(ValueError, match=f"high: got {high}"):
        NOISE.integers(1, high)


def test_truncated_normal_has_its_moments() -> None:
    x = NOISE.truncated_normal(32)
    assert x.dtype == torch.float32 and x.shape == (len(NOISE.tokens), 32)
    assert float(x.abs().max()) <= 2.0
    x = x.double()
    error = SIGMAS / x.numel() ** 0.5
    # closed forms for a normal cut at two deviations; moments 2, 4 and 8 give the deviations of 1, 2 and 4
    assert abs(float(x.mean())) < 0.8796 * error
    assert float((x**2).mean()) == pytest.approx(0.77374, abs=0.905 * error)
    assert float((x**4).mean()) == pytest.approx(1.41619, abs=2.8 * error)


def test_no_token_at_all() -> None:
    nothing = TokenNoise(1, torch.arange(0))
    assert nothing.words(3).shape == nothing.integers(3, 9).shape == nothing.truncated_normal(3).shape == (0, 3)
