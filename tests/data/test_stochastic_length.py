"""Stochastic Length: the law of lengths, fair draws, and the same draws whoever makes them."""

from __future__ import annotations

from statistics import NormalDist
from typing import Literal

import numpy as np
import pytest

from hstu_dist.data.config import StochasticLengthConfig
from hstu_dist.data.stochastic_length import History, StochasticLength, spans

Selection = Literal["greedy", "random", "weighted"]
SELECTIONS: list[Selection] = ["greedy", "random", "weighted"]


def law_of(
    selection: Selection = "weighted", alpha: float = 1.6, max_length: int = 4096, seed: int = 3
) -> StochasticLength:
    config = StochasticLengthConfig(alpha=alpha, selection=selection)
    return StochasticLength(config, max_length, seed)


def histories(lengths: list[int], kept: list[int], first_sequence: int = 0) -> History:
    """Laid end to end, one event that is only a target after each."""
    sizes = np.array(lengths, dtype=np.int64)
    return History(
        sequences=np.arange(len(lengths)) + first_sequence,
        firsts=np.cumsum(sizes + 1) - (sizes + 1),
        lengths=sizes,
        kept=np.array(kept, dtype=np.int64),
    )


def test_paper_s_example_of_4096_becoming_776() -> None:
    assert law_of().cut_length == 776
    assert law_of(alpha=2.0).cut_length == 4096
    config = StochasticLengthConfig(max_length=100)
    assert StochasticLength(config, 4096, 0).cut_length == round(100**0.8)


def test_lengths_follow_the_law() -> None:
    law, draws = law_of(), 40_000
    for n in (1, 776, 777, 900, 2000, 4096):
        kept = law.kept_lengths(np.arange(draws), np.full(draws, n), epoch=0)
        assert set(kept.tolist()) <= {n, min(n, 776)}
        probability = min(1.0, 4096**1.6 / n**2)
        deviation = 4 * np.sqrt(probability * (1 - probability) / draws) + 1e-3
        assert abs((kept == n).mean() - probability) <= deviation
        if n > 776:
            assert law.keep_probability(np.array([n]))[0] == pytest.approx(probability, rel=1e-3)


def test_sparsity_is_the_paper_s() -> None:
    """Of log-normal histories (median 3,443, sigma 1.8) cut at 1k to 8k, at alpha 1.6; the paper names no law."""
    uniform = (np.arange(50_000) + 0.5) / 50_000
    lengths = 3443 * np.exp(1.8 * np.array([NormalDist().inv_cdf(u) for u in uniform]))
    for longest, published in ((1024, 71.5), (2048, 76.1), (4096, 80.5), (8192, 84.4)):
        whole = np.clip(lengths, 1, longest).astype(np.int64)
        kept = law_of(max_length=longest).kept_lengths(np.arange(len(whole)), whole, epoch=1)
        assert 100 * (1 - kept.mean() / longest) == pytest.approx(published, abs=1.0)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_events_are_a_subsequence_of_the_right_length(selection: Selection) -> None:
    lengths, kept = [1, 5, 40, 40, 3, 100, 2], [1, 5, 10, 40, 1, 99, 1]
    history = histories(lengths, kept)
    times = np.sort(np.random.default_rng(0).integers(0, 10**6, 300))
    events = law_of(selection).events(history, times, epoch=2)
    parts = np.split(events, np.cumsum(kept)[:-1])
    for first, length, count, part in zip(history.firsts, lengths, kept, parts, strict=True):
        assert len(part) == count and (np.diff(part) > 0).all()
        assert first <= part[0] and part[-1] < first + length
        if selection == "greedy":
            assert part.tolist() == list(range(first + length - count, first + length))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_nothing_to_choose_from(selection: Selection) -> None:
    none = histories([], [])
    assert law_of(selection).events(none, np.empty(0, dtype=np.int64), 0).tolist() == []
    whole = histories([3, 2], [3, 2])
    assert law_of(selection).events(whole, np.arange(10), 0).tolist() == [0, 1, 2, 4, 5]


def inclusion(selection: Selection, times: list[int], kept: int) -> np.ndarray:
    """How often each input of one history is kept, over many sequences."""
    n, draws = len(times), 20_000
    history = histories([n] * draws, [kept] * draws)
    events = law_of(selection).events(history, np.tile([*times, times[-1]], draws), epoch=0)
    return np.bincount(events % (n + 1), minlength=n) / draws


def test_random_selection_is_uniform() -> None:
    assert inclusion("random", [0, 1, 2, 3, 100], 2) == pytest.approx(np.full(5, 0.4), abs=0.015)


def test_weighted_selection_draws_without_replacement_by_recency() -> None:
    # ages 6, 3, 1, 0 of 10 in all: weights 0.4, 0.7, 0.9, 1.0
    weights = np.array([0.4, 0.7, 0.9, 1.0])
    expected = np.zeros(4)
    for first in range(4):
        for second in set(range(4)) - {first}:
            chance = weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
            expected[[first, second]] += chance
    assert inclusion("weighted", [0, 3, 5, 6], 2) == pytest.approx(expected, abs=0.015)


def test_an_input_of_no_weight_comes_last_and_equal_times_are_all_alike() -> None:
    assert inclusion("weighted", [0, 9, 9], 2).tolist() == [0, 1, 1]
    assert inclusion("weighted", [9, 9, 9], 1) == pytest.approx(np.full(3, 1 / 3), abs=0.015)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_draws_depend_on_seed_sequence_and_epoch_only(selection: Selection) -> None:
    lengths, kept = [50, 60, 70, 80], [20, 60, 30, 7]
    whole, times = histories(lengths, kept), np.arange(300)
    events = law_of(selection).events(whole, times, epoch=5)
    starts = np.cumsum(kept) - kept
    for i in range(4):
        alone = History(**{name: values[i : i + 1] for name, values in vars(whole).items()})
        assert law_of(selection).events(alone, times, epoch=5).tolist() == (
            events[starts[i] : starts[i] + kept[i]].tolist()
        )
    if selection != "greedy":
        assert events.tolist() != law_of(selection).events(whole, times, epoch=6).tolist()
        assert events.tolist() != law_of(selection, seed=4).events(whole, times, epoch=5).tolist()


def test_lengths_depend_on_seed_sequence_and_epoch_only() -> None:
    sequences, lengths = np.arange(500), np.full(500, 1000)
    kept = law_of().kept_lengths(sequences, lengths, epoch=1)
    again = law_of().kept_lengths(sequences[::-1], lengths, epoch=1)
    assert kept.tolist() == again[::-1].tolist()
    for other in (law_of().kept_lengths(sequences, lengths, 2), law_of(seed=4).kept_lengths(sequences, lengths, 1)):
        assert 0.3 < (kept == other).mean() < 0.9


def test_keys_make_room_for_many_long_histories() -> None:
    # 2^17 histories and positions of 17 bits leave 29 of 31 key bits
    history = histories([1] * (1 << 17) + [70_000], [1] * (1 << 17) + [3])
    events = law_of("random")._subsequences(history, np.empty(0, dtype=np.int64), 0)
    assert len(events) == (1 << 17) + 3 and (np.diff(events) > 0).all()


def test_spans() -> None:
    assert spans(np.array([5, 9, 0]), np.array([2, 0, 3])).tolist() == [5, 6, 0, 1, 2]
