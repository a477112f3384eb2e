"""A tiny run trained once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from hstu_dist.commands.train import train
from tests.distributed.cases import tiny_config
from tests.distributed.ranks import run_ranks


def _train(data: Path, output: Path) -> None:
    train(tiny_config(data, output, "trainer.checkpoint.keep=1"), lambda line: None)


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of one rank on the tiny data set, with its best checkpoint and the newest."""
    output = tmp_path_factory.mktemp("runs")
    run_ranks(1, _train, tiny_data, output)
    return output / "tiny"
