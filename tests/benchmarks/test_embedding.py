"""The contenders of the embedding benchmark compute the same; its large table fits; its ranks report what they hold."""

from __future__ import annotations

import pytest

from benchmarks.embedding import rows_that_fit
from benchmarks.embedding_cases import KINDS, Case, contenders
from benchmarks.embedding_worker import Answer, Request, measure
from benchmarks.harness import refuse_wrong
from hstu_dist.distributed.config import TableShape
from hstu_dist.distributed.process_group import process_group
from hstu_dist.errors import UserError
from tests.distributed.ranks import run_ranks


def refused() -> list[str]:
    with process_group("cpu", 30):
        found = []
        for case in (
            Case(name="all", shape=TableShape(30, 6), ids=None),
            Case(name="some", shape=TableShape(100, 8), ids=20),
        ):
            for kind in KINDS:
                checked = refuse_wrong(contenders(case, kind), 1e-5)
                assert len(checked.sound) + len(checked.refused) == 4
                found += [f"{case.name}, {kind}, {reason}" for reason in checked.refused]
        return found


@pytest.mark.distributed
def test_all_ways_compute_what_float64_does() -> None:
    assert run_ranks(1, refused) == [[]]


def test_the_large_table_leaves_room() -> None:
    # fp16 rows of 32 and an accumulator: 68 bytes
    assert rows_that_fit(20 * 10**9) == 100_000_000
    assert rows_that_fit(5 * 10**9) == 40_000_000
    with pytest.raises(UserError, match=r"large table: 1.0 GB are free, too little -> give --rows ROWS"):
        rows_that_fit(10**9)


@pytest.mark.distributed
def test_ranks_report_bytes_and_movement() -> None:
    embedding = {"dtype": "fp16", "optimizer": {"kind": "rowwise_adagrad"}}
    request = Request(measure="table", steps=2, embedding=embedding, rows=1001, width=32, ids=50)
    answer, nothing = run_ranks(2, measure, request)
    assert nothing is None and isinstance(answer, Answer)
    assert answer.state_bytes == 1001 * 68 and answer.peak_bytes > 10**8
    assert answer.moved > 0.99 and len(answer.seconds) == 2
