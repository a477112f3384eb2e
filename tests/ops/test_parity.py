"""Every backend computes what the reference computes."""

from __future__ import annotations

import pytest
import torch

from hstu_dist.errors import UserError
from hstu_dist.ops import backends
from hstu_dist.ops.spec import Backend
from tests.ops.cases import CASES, Case, assert_as_exact_as_eager

CPU_BACKENDS = [b for b in backends.available(torch.device("cpu")) if b is not Backend.REFERENCE]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_float32_matches_float64_reference(backend: Backend, case: Case) -> None:
    assert_as_exact_as_eager(backend, torch.float32, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_blocked_in_float64(case: Case) -> None:
    assert_as_exact_as_eager(Backend.BLOCKED, torch.float64, case)


def test_kernels_for_cpus_are_refused_elsewhere() -> None:
    with pytest.raises(UserError, match="attention backend native: computes on CPUs, but the device is cuda"):
        backends.chosen("native", torch.device("cuda"))
    assert backends.chosen("reference", torch.device("cuda")) is Backend.REFERENCE
