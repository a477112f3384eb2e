"""Two jobs on one run folder: the second is refused as long as any rank 0 of the first lives."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from hstu_dist.errors import ExitCode
from hstu_dist.run_folder import RunFolder
from tests.launch.runs import TinyRun

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_ranks_that_outlive_their_launcher_keep_the_folder(tiny_data: Path, tmp_path: Path) -> None:
    run = TinyRun(tiny_data, tmp_path)
    with run.launch() as launch:
        run.wait_for_step(6, launch)
        ranks = launch.ranks()
        assert len(ranks) == 2
        # held still, so that they cannot finish before the second job comes
        for rank in ranks:
            rank.suspend()
        agents = [p for p in psutil.Process(launch.process.pid).children(recursive=True) if p not in ranks]
        launch.process.kill()
        launch.wait()
    try:
        # the number of ranks may change between two starts
        with run.launch("nproc=1") as second:
            refused = second.wait()
        before = run.checkpoints()
        assert refused.code == ExitCode.BAD_INPUT
        assert "another process is training in it" in refused.err and "Traceback" not in refused.err
        assert all(rank.is_running() for rank in ranks)
    finally:
        for agent in agents:
            agent.kill()
        _, alive = psutil.wait_procs(ranks, timeout=10)
    # ranks end with their agent
    assert not alive and run.checkpoints() == before
    # whoever comes after the last of them has the folder
    with RunFolder(run.folder).lock():
        pass
