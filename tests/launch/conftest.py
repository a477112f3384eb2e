"""One undisturbed run on the tiny data set, shared by the tests of launching."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.runs import Ended, TinyRun


@pytest.fixture(scope="session")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, Ended]:
    """A run that was launched once and left alone."""
    run = TinyRun(tiny_data, tmp_path_factory.mktemp("undisturbed"))
    with run.launch() as launch:
        return run, launch.wait()
