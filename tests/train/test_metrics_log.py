"""Metrics land in JSON lines, TensorBoard and an offline W&B run, and a resumed run rewrites its future."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hstu_dist.errors import UserError
from hstu_dist.train.config import LoggingConfig
from hstu_dist.train.metrics_file import METRICS_FILE, read_metrics
from hstu_dist.train.metrics_log import MetricsLog

PLAIN = LoggingConfig(progress=False, tensorboard=False)


def write(run_dir: Path, config: LoggingConfig, steps: range, resume_step: int = 0, value: float = 1.0) -> None:
    with MetricsLog(run_dir, config, {"name": "tiny", "model": {"width": 8}}, resume_step) as log:
        for step in steps:
            log.write(step, {"train/loss": value / step, "train/epoch": 0.5})


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    write(tmp_path, PLAIN, range(1, 4))
    assert read_metrics(tmp_path) == [{"step": i, "train/loss": 1 / i, "train/epoch": 0.5} for i in (1, 2, 3)]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, PLAIN, range(1, 8))
    with (tmp_path / METRICS_FILE).open("a") as file:
        # killed while writing
        file.write('{"step": 8, "train/lo')
    write(tmp_path, PLAIN, range(5, 7), resume_step=4, value=2.0)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["train/loss"] for line in lines] == [1, 1 / 2, 1 / 3, 1 / 4, 2 / 5, 2 / 6]
    assert [entry.name for entry in tmp_path.iterdir()] == [METRICS_FILE]


# of TensorBoard's own thread, which dies of it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_the_board(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        # more than there is room for
        write(disk, LoggingConfig(progress=False), range(1, 4000))
        assert caplog.text.count("TensorBoard's files cannot be written (No space left on device)") == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("rest", ["", "\n", "{}\n", "3\n", '{"step": null}\n', "\0\0\0"])
def test_a_damaged_line_does_not_stop_a_run(rest: str, tmp_path: Path) -> None:
    write(tmp_path, PLAIN, range(1, 3))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(rest)
    write(tmp_path, PLAIN, range(3, 4), resume_step=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_tensorboard_reads_the_same_values(tmp_path: Path) -> None:
    config = LoggingConfig(progress=False, tensorboard=True)
    write(tmp_path, config, range(1, 7))
    write(tmp_path, config, range(4, 9), resume_step=3, value=2.0)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/epoch"}
    shown = {event.step: event.value for event in board.Scalars("train/loss")}
    # steps 4 to 6 of the first process are gone
    assert shown == pytest.approx({i: (1 if i <= 3 else 2) / i for i in range(1, 9)})


@pytest.fixture
def own_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of the developer's own W&B reaches the run, and the network is not to be touched."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost", "::1"), address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.mark.slow
@pytest.mark.usefixtures("own_wandb")
def test_wandb_offline_writes_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the run's own settings win over the environment
    monkeypatch.setenv("WANDB_MODE", "online")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = LoggingConfig(progress=False, tensorboard=False, wandb="offline", wandb_project="test")
    write(run_dir, config, range(1, 4))
    # its service writes the last records when it ends, at the latest with the process
    wandb.teardown()
    (run,) = (run_dir / "wandb").glob("offline-run-*")
    (file,) = run.glob("run-*.wandb")
    content = file.read_bytes()
    assert b"train/loss" in content and b"width" in content
    assert [line["step"] for line in read_metrics(run_dir)] == [1, 2, 3]


def test_a_failing_wandb_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: Any) -> None:
        raise wandb.errors.UsageError("no API key configured\nlong explanation")

    monkeypatch.setattr(wandb, "init", refuse)
    config = LoggingConfig(progress=False, tensorboard=False, wandb="online")
    with pytest.raises(UserError, match="Weights & Biases: no API key configured -> run `wandb login`"):
        MetricsLog(tmp_path, config, {}, 0)
