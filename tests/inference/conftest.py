"""Tiny runs trained once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from hstu_dist.commands.train import train
from hstu_dist.config import compose
from tests.distributed.cases import tiny_config
from tests.distributed.ranks import run_ranks
from tests.rated import rated_overrides


def _train(data: Path, output: Path) -> None:
    train(tiny_config(data, output, "trainer.checkpoint.keep=1"), lambda line: None)


def _train_to_rank(data: Path, output: Path) -> None:
    train(compose([*rated_overrides(data, output), "nproc=1", "trainer.checkpoint.keep=1"]), lambda line: None)


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of one rank on the tiny data set, with its best checkpoint and the newest."""
    output = tmp_path_factory.mktemp("runs")
    run_ranks(1, _train, tiny_data, output)
    return output / "tiny"


@pytest.fixture(scope="session")
def rated_run(rated_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished ranking run of one rank, with the contextual feature `user`."""
    output = tmp_path_factory.mktemp("runs")
    run_ranks(1, _train_to_rank, rated_data, output)
    return output / "rated"
