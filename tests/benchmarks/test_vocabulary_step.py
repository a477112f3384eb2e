"""Every kind of vocabulary takes the same steps; with zch new ids keep getting rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.vocabulary_step import KINDS, METRIC, STATIC, Steps
from hstu_dist.distributed.process_group import process_group
from hstu_dist.distributed.vocabulary import GrowingVocabulary
from hstu_dist.report.results import load
from tests.distributed.ranks import run_ranks


@pytest.mark.slow
def test_a_quick_run_compares_every_kind(tmp_path: Path) -> None:
    assert main(["vocabulary_step", "--quick", "--output", str(tmp_path)]) == 0
    found = load("vocabulary_step", tmp_path)
    assert [row.contender for row in found.rows] == list(KINDS) and {row.metric for row in found.rows} == {METRIC}
    assert [(ratio.a, ratio.b) for ratio in found.ratios] == [(name, STATIC) for name in KINDS if name != STATIC]


def counts_of(rows: int) -> list[int]:
    with process_group("cpu", 30):
        steps = Steps(rows, KINDS["zch, lru"])
        vocabulary = steps.vocabulary
        assert isinstance(vocabulary, GrowingVocabulary)
        vocabulary.usage.take()
        steps()
        return [*vocabulary.usage.take(), int(vocabulary.occupied().sum())]


@pytest.mark.distributed
def test_the_vocabulary_is_full_and_new_ids_take_rows_of_others() -> None:
    ((lookups, _, admitted, evicted, occupied),) = run_ranks(1, counts_of, 20_000)
    assert lookups == 128_000 and admitted >= evicted > 500 and occupied > 19_900
