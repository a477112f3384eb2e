"""The search for tile sizes ends at a place that none of its neighbours beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.tune import climb, neighbours


@dataclass(frozen=True)
class Tile:
    queries: int
    keys: int
    warps: int
    stages: int


def around(place: int) -> tuple[int, int]:
    return place - 1, place + 1


def test_climbs_to_the_fastest_reachable_place() -> None:
    assert climb(0, around, lambda places: {p: 1.0 + abs(p - 5) for p in places}) == 5


def test_noise_moves_nothing() -> None:
    assert climb(0, around, lambda places: {p: 1.0 - 0.01 * p for p in places}) == 0


def test_leaves_a_start_that_does_not_work_and_stays_if_nothing_does() -> None:
    def only_positive(places: Sequence[int]) -> dict[int, float]:
        return {p: float(p) for p in places if p > 0}

    assert climb(0, around, only_positive) == 1
    assert climb(-5, around, only_positive) == -5


def test_neighbours_are_one_step_away_and_within_what_chips_offer() -> None:
    assert set(neighbours(Tile(256, 16, 8, 1))) == {
        Tile(128, 16, 8, 1),
        Tile(256, 32, 8, 1),
        Tile(256, 16, 4, 1),
        Tile(256, 16, 8, 2),
    }
