"""Histories beside a dictionary of lists; memory that does not grow."""

from __future__ import annotations

import numpy as np
import pytest

from hstu_dist.data.stream.histories import BYTES_PER_EVENT, BYTES_PER_USER, Histories
from hstu_dist.data.stream.reading import Events
from tests.data.stream.cases import events_of


def by_user(events: Events) -> Events:
    return events.at(np.argsort(events.users, kind="stable"))


@pytest.mark.parametrize("seed", range(3))
def test_what_is_kept_is_what_a_dictionary_keeps(seed: int) -> None:
    longest = 5
    histories, naive = Histories(longest, 10**9), {}  # type: ignore[var-annotated]
    for part in events_of(8, users=20, a_user=2, seed=seed):
        part = Events(part.users * 7 - 60, part.items, part.seconds, part.actions)
        window = histories.advance(by_user(part))
        joined = window.events
        assert joined.users.tolist() == sorted(set(part.users.tolist()))
        for row, user in enumerate(joined.users.tolist()):
            mine = slice(joined.offsets[row], joined.offsets[row + 1])
            before = naive.get(user, [])
            assert window.history[row] == len(before)
            assert joined.actions[mine].tolist() == before + part.actions[part.users == user].tolist()
            naive[user] = joined.actions[mine].tolist()[-longest:]
        kept = histories.kept
        assert (np.diff(kept.users) > 0).all()
        found = {
            user: kept.actions[kept.offsets[row] : kept.offsets[row + 1]].tolist()
            for row, user in enumerate(kept.users.tolist())
        }
        assert found == naive


def test_who_was_not_seen_longest_leaves_first() -> None:
    limit = 40 * (BYTES_PER_USER + 4 * BYTES_PER_EVENT)
    histories = Histories(4, limit)
    last_seen: dict[int, int] = {}
    for part in events_of(30, users=300, a_user=1):
        histories.advance(by_user(part))
        kept = histories.kept
        assert kept.num_bytes <= limit
        for user, second in zip(part.users.tolist(), part.seconds.tolist(), strict=True):
            last_seen[user] = second
        gone = set(last_seen) - set(kept.users.tolist())
        newest_gone = max((last_seen[user] for user in gone), default=0)
        assert newest_gone <= min(last_seen[user] for user in kept.users.tolist())
        # a user who left and comes back begins anew
        for user in gone:
            del last_seen[user]
    assert histories.evicted > 100


def test_a_user_that_alone_is_too_large_is_still_predicted_but_not_kept() -> None:
    histories = Histories(100, 200)
    part = by_user(Events(np.zeros(50, np.int64), np.arange(50), np.arange(50), np.zeros(50, np.int32)))
    assert len(histories.advance(part).events.items) == 50
    assert len(histories.kept.users) == 0
