"""The data benchmark: what counts as a rate, and a whole quick run that meets what does not depend on speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.data import FEED, LAWS, PUBLISHED_SPARSITY, READ, WHOLE, feed_ratios, feed_rows
from benchmarks.harness import Samples, Timings
from hstu_dist.report import results


def test_rates_are_of_events_and_the_first_epoch_reads() -> None:
    seconds = {READ: Samples((1.0, 3.0)), WHOLE: Samples((0.5, 0.5))}
    timings = Timings(seconds | {name: Samples((0.6, 0.8)) for name in LAWS})
    rows = {(row.contender, row.metric): row for row in feed_rows(timings, 20_000_000)}
    assert rows[WHOLE, "events"].value == 40.0 and rows[WHOLE, "events"].unit == "million/s"
    added = rows["cut, random", "added to whole histories, a million events"]
    assert added.value == pytest.approx(10.0) and added.unit == "ms"
    ratios = {ratio.a: ratio for ratio in feed_ratios(timings, 20_000_000)}
    assert ratios[WHOLE].value == pytest.approx(5.0) and ratios[WHOLE].met
    assert ratios[f"first epoch: {READ}, {WHOLE}"].value == pytest.approx(1.0)
    assert ratios["cut, weighted"].value == pytest.approx(20 / 0.7 / 8)


@pytest.mark.slow
def test_a_quick_run_reports_every_part(tmp_path: Path) -> None:
    assert main(["data", "--quick", "--output", str(tmp_path)]) == 0
    found = results.load("data", tmp_path)
    assert {row.contender for row in found.rows if row.case == FEED} == {READ, WHOLE, *LAWS}
    sparsities = [ratio for ratio in found.ratios if ratio.metric == "sparsity"]
    assert len(sparsities) == len(PUBLISHED_SPARSITY) and all(ratio.met for ratio in sparsities)
    balances = [ratio for ratio in found.ratios if ratio.metric == "work of the busiest rank"]
    assert len(balances) == 4 and all(ratio.met for ratio in balances)
    imbalances = [row for row in found.rows if row.metric == "imbalance"]
    assert {row.contender for row in imbalances} == {"in turns", "cost", "cost and count", "largest sequence"}
