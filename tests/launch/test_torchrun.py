"""The agent's command line is a pure function of the launch: torchrun and a shell read it as it was meant."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from hstu_dist.config import compose
from hstu_dist.machine import cores_per_rank
from launch.spec import LaunchSpec
from launch.torchrun import agent_command, agent_environment, as_shell

SPEC = LaunchSpec(config_file=Path("runs/my run/launch.yaml"), ranks=4, threads=2, max_restarts=3)


def test_torchrun_reads_the_arguments() -> None:
    command = agent_command(SPEC)
    assert command[:3] == [sys.executable, "-m", "hstu_dist.distributed.agent"]
    read = parse_args(command[3:])
    assert (read.nproc_per_node, read.nnodes, read.max_restarts) == ("4", "1:1", 3)
    assert (read.rdzv_backend, read.rdzv_endpoint, read.shutdown_timeout) == ("c10d", "localhost:0", SPEC.stop_seconds)
    assert read.module and read.training_script == "hstu_dist"
    assert read.training_script_args == ["train", "--config", "runs/my run/launch.yaml"]


def test_a_shell_reads_the_line_back() -> None:
    line = as_shell(agent_command(SPEC), agent_environment(SPEC))
    assert "\n" not in line
    assert shlex.split(line) == ["OMP_NUM_THREADS=2", "TORCH_CPP_LOG_LEVEL=FATAL", *agent_command(SPEC)]


@pytest.mark.slow
def test_spec_takes_ranks_threads_and_restarts_from_the_run() -> None:
    settings = ["name=a", "output=out", "nproc=3", "cluster.max_restarts=2"]
    spec = LaunchSpec.of(compose(settings))
    assert spec == LaunchSpec(config_file=Path("out/a/launch.yaml"), ranks=3, threads=cores_per_rank(3), max_restarts=2)
    assert LaunchSpec.of(compose([*settings, "trainer.threads=5"])).threads == 5
