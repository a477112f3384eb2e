"""The kernels' compile reports: committed for every default configuration, up to date, and without spills."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.environment import RESULTS
from benchmarks.kernels import ARCHITECTURES, HASH, Case, cases, compile_case, faults, rows_of
from hstu_dist.report.results import Results, Row, load

pytest.importorskip("triton")

SAMPLE = [
    Case("sm_80", "query", 64, False),
    Case("sm_90", "forward", 64, True),
    Case("sm_90", "bias", 32, True),
    Case("sm_90", "query", 50, True),
    Case("sm_100", "key", 64, False),
    Case("gfx942", "forward", 128, False),
]
"""Compiled anew in every run, a few seconds each; the rest is vouched for by the hash."""


@pytest.fixture(scope="module")
def report() -> Results:
    return load("kernels", RESULTS)


def rows_for(report: Results, case: Case) -> list[Row]:
    return [row for row in report.rows if row.case == case.name]


def test_the_report_is_of_these_kernels(report: Results) -> None:
    from hstu_dist.ops.triton.compile_report import source_hash

    assert report.versions[HASH] == source_hash(), "kernels changed: run python -m benchmarks kernels"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_default_configuration_spills(report: Results, architecture: str) -> None:
    chosen = [case for case in cases() if case.architecture == architecture]
    assert len(chosen) == 35
    assert {case.name: found for case in chosen if (found := faults(case, rows_for(report, case)))} == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLE, ids=lambda c: c.name)
def test_compiles_to_what_the_report_says(report: Results, case: Case) -> None:
    assert list(rows_of(case, *compile_case(case))) == rows_for(report, case)


def test_the_gate_sees_every_fault(report: Results) -> None:
    case = Case("sm_90", "forward", 64, False)
    sound = rows_for(report, case)
    for metric, value in (("spill_bytes", 8.0), ("shared_bytes", 240e3), ("tensor_ops", 0.0), ("serialized", 1.0)):
        broken = [replace(r, value=value, q25=value, q75=value) if r.metric == metric else r for r in sound]
        assert len(faults(case, broken)) == 1
