"""Shared test set-up: uninitialised memory is NaN, every test starts from the same seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.rated import write_rated_dataset
from tests.tiny import write_tiny_dataset


def pytest_configure(config: pytest.Config) -> None:
    """One compute thread where several test processes share the cores: OpenMP's threads spin while they wait."""
    if hasattr(config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that a value nobody wrote cannot pass for a zero."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of 60 users and 40 items."""
    return write_tiny_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def rated_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of 40 users who rate 30 items."""
    return write_rated_dataset(tmp_path_factory.mktemp("data"))
