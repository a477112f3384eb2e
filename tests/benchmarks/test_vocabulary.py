"""The drifting stream is what it says; ids are ranked alike whatever rows they have; the benchmark runs to its end."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.drift import Drift, Numbers, catalogue_of, play
from benchmarks.vocabulary import ALL, FIRST, HASH, ROOMY, SHARED_IDS, TIGHT, bytes_per_row
from benchmarks.vocabulary_hook import CUTOFF, expected_hits
from hstu_dist.report.results import load

ZCH = "zch, distance_lfu"
SMALL = Drift(windows=4, users=30, events_a_user=5, topics=3, live=60, renewed=0.25)


def test_items_come_and_go_under_new_ids() -> None:
    periods = list(SMALL.periods(1))
    assert len(periods) == 4
    for before, after in pairwise(periods):
        assert len(before.live) == len(np.unique(after.live)) == 60
        assert len(np.setdiff1d(after.live, before.live)) == 15
        assert after.seconds[0] >= before.seconds[-1] and (np.diff(after.seconds) >= 0).all()
    assert all(np.isin(period.items, period.live).all() and len(period.items) == 150 for period in periods)
    every = np.unique(np.concatenate([period.live for period in periods]))
    assert len(every) == 60 + 3 * 15 and (every > 2**32).sum() == 45
    again, other = list(SMALL.periods(1)), list(SMALL.periods(2))
    assert (again[3].items == periods[3].items).all() and (other[3].items != periods[3].items).any()


def test_topics_can_be_learnt_from_what_a_user_did() -> None:
    # by ids of the first window, which lie in the order of their topics before they are named
    law = Drift(windows=1, users=200, events_a_user=20, topics=5, live=100, renewed=0.0)
    (period,) = law.periods(3)
    by_user = period.items.reshape(20, 200)
    repeated = np.mean([len(np.unique(by_user[:, user])) for user in range(200)])
    # of 20 draws from all items by the same law about 17 differ
    assert repeated < 14


def test_a_stream_is_played_by_ids_or_by_numbers(tmp_path: Path) -> None:
    periods = list(SMALL.periods(1))
    first, everything = Numbers.of_most(periods[:1], 20), Numbers.of_all(periods)
    assert len(first) == 21 and len(everything) == 105
    play(periods, tmp_path / "raw")
    play(periods, tmp_path / "first", first)
    play(periods, tmp_path / "all", everything)
    raw, some, all_ = (
        pq.read_table(tmp_path / name / "window=0003" / "events.parquet")["item_id"].to_numpy()
        for name in ("raw", "first", "all")
    )
    assert (raw == periods[3].items).all()
    assert (everything.known[all_] == raw).all()
    assert ((some == 20) == ~np.isin(raw, first.known)).all() and (first.known[some[some < 20]] == raw[some < 20]).all()
    live = np.load(catalogue_of(tmp_path / "first"))
    assert (
        live.shape == (4, 60)
        and (live[0] >= 0).sum() == 20
        and ((live >= 0) == np.isin(np.stack([period.live for period in periods]), first.known)).all()
    )


def test_hits_among_ids_are_those_of_a_shuffled_sort() -> None:
    g = torch.Generator().manual_seed(0)
    # few different scores: ties of rows beside those of ids
    scores = torch.randint(6, (40, 30), generator=g).float()
    rows_of_ids = torch.randint(30, (50,), generator=g)
    target = rows_of_ids[torch.randint(50, (40,), generator=g)]
    expected = expected_hits(scores, target, rows_of_ids.bincount(minlength=30))
    for user in range(40):
        of_ids = scores[user, rows_of_ids]
        better, tied = (
            int((of_ids > scores[user, target[user]]).sum()),
            int((of_ids == scores[user, target[user]]).sum()),
        )
        assert float(expected[user]) == pytest.approx(min(1.0, max(0.0, (CUTOFF - better) / tied)))


def test_scores_that_are_no_numbers_hit_nothing() -> None:
    scores = torch.full((2, 5), torch.nan)
    assert expected_hits(scores, torch.tensor([0, 3]), torch.full((5,), 4)).tolist() == [0.0, 0.0]


def test_hashing_gets_the_bytes_that_zch_needs_beside_its_rows() -> None:
    # 32 fp32 and an accumulator; key, count, last step, as much while waiting, an index of two, a mask and a list
    assert bytes_per_row("hash") == 4 * 33
    assert bytes_per_row("zch") == 4 * 33 + 8 * 8 + 5


@pytest.mark.slow
def test_a_quick_run_measures_both_sizes(tmp_path: Path) -> None:
    assert main(["vocabulary", "--quick", "--output", str(tmp_path)]) == 0
    found = load("vocabulary", tmp_path)
    contenders = {(row.case, row.contender) for row in found.rows}
    assert contenders == {*product((ROOMY, TIGHT), (ZCH, HASH)), (ROOMY, FIRST), (ROOMY, ALL)}
    assert all(ratio.target == 1.0 for ratio in found.ratios if ratio.b == HASH)
    assert found.value(ROOMY, ALL, SHARED_IDS) == 0.0 < found.value(ROOMY, FIRST, SHARED_IDS)
    assert 0 < found.value(ROOMY, HASH, SHARED_IDS) < found.value(TIGHT, HASH, SHARED_IDS)
    # half of the ids find no row in the smaller table
    assert found.value(ROOMY, ZCH, SHARED_IDS) < found.value(TIGHT, ZCH, SHARED_IDS) > 0.4
    assert (tmp_path / "vocabulary_windows.png").exists()
