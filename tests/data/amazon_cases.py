"""Files in the two official formats of the Amazon reviews of 2014, generated."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DAY = 86_400
FIRST_DAY = 1_369_699_200


class Rating(NamedTuple):
    """One review, without its text."""

    user: str
    item: str
    stars: int
    time: int


def user_id(number: int) -> str:
    return f"A{number:013X}"


def item_id(number: int) -> str:
    return f"B{number:09X}"


def random_ratings(seed: int, users: int = 30, items: int = 20, events: int = 250) -> list[Rating]:
    """Dense at low numbers and sparse at high ones, on few days, in no order; some rows come twice."""
    random = np.random.default_rng(seed)
    rows = [
        Rating(
            user_id(int(users * random.random() ** 2)),
            item_id(int(items * random.random() ** 2)),
            int(random.integers(1, 6)),
            FIRST_DAY + DAY * int(random.integers(0, 12)),
        )
        for _ in range(events)
    ]
    return [*rows, *(rows[i] for i in random.integers(0, events, 10))]


def walks(users: int = 80, items: int = 30) -> list[Rating]:
    """A 5-core with something to learn: everyone walks through the catalogue with a stride of 1 or 2, a day a step."""
    random = np.random.default_rng(3)
    starts = random.integers(0, items, users)
    return [
        Rating(user_id(user), item_id((starts[user] + step * (1 + user % 2)) % items), 5, FIRST_DAY + DAY * step)
        for user in range(users)
        for step in range(random.integers(6, 16))
    ]


def review_line(rating: Rating, **changed: Any) -> str:
    """One line of a review file."""
    date = datetime.fromtimestamp(rating.time, UTC)
    content = {
        "reviewerID": rating.user,
        "asin": rating.item,
        "reviewerName": 'Ann "zoë" O\'Hara, Esq.',
        "helpful": [3, 4],
        "reviewText": "Very oily.\nI'd buy {it} again, they're {'fine'} \U0001f600.",
        "overall": float(rating.stars),
        "summary": "Don't waste your money",
        "unixReviewTime": rating.time,
        "reviewTime": f"{date:%m} {date.day}, {date.year}",
    } | changed
    # reviewers without a name have no such key
    return json.dumps({k: v for k, v in content.items() if v is not ...})


def rating_line(rating: Rating) -> str:
    """One line of a rating file."""
    return f"{rating.user},{rating.item},{float(rating.stars)},{rating.time}"


def write_lines(file: Path, lines: Iterable[str]) -> Path:
    """Plain or gzip, by the file's name."""
    content = "".join(f"{line}\n" for line in lines).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def write_ratings(file: Path, ratings: Sequence[Rating]) -> Path:
    """A review file or a rating file, by the file's name."""
    line = rating_line if ".csv" in file.name else review_line
    return write_lines(file, map(line, ratings))
