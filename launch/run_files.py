"""What launching leaves in the run folder: resolved settings, the job that a scheduler gave, a request to stop."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hstu_dist.checkpoint.manifest import MANIFEST_FILE, step_of
from hstu_dist.commands.result_table import finished_report
from hstu_dist.config import RunConfig, load, save
from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically
from hstu_dist.preflight import preflight
from hstu_dist.run_folder import RunFolder, manifest_of
from launch.spec import Program

_JOB_FILE = "job.json"


def checked_folder(config: RunConfig, program: Program = "train") -> RunFolder:
    """The run's folder, after everything that can be checked here, with its resolved settings in it.

    The doctor is not held up by what it is there to find.

    Raises:
        UserError: one line that says what does not fit and how to mend it.
    """
    if program == "train":
        # every number of machines that an elastic run may go on with
        for ranks in range(config.least_world_size, config.world_size + 1, config.nproc):
            preflight(config, ranks)
    folder = RunFolder(config.run_dir)
    if program == "doctor":
        folder.check(config, needed_bytes=0)
    else:
        # whoever trains here reads both files below
        folder.check_unused()
    # left by a run that ended while it was asked to stop
    folder.stop_file.unlink(missing_ok=True)
    save(config, folder.launch_file)
    return folder


def finished_text(config: RunConfig) -> str | None:
    """What a run that has nothing left to train shows; None for any other.

    Raises:
        UserError: it is a run with other settings, or on other data, that has finished here.
    """
    folder = RunFolder(config.run_dir)
    result = folder.finished(config.trainer.last_epoch)
    if result is None:
        return None
    folder.check_settings(config)
    folder.check_data(config, manifest_of(config))
    return finished_report(config, result)


def progress(config: RunConfig) -> str:
    """How far a run has come, as its folder shows."""
    folder = RunFolder(config.run_dir)
    if folder.finished(config.trainer.last_epoch) is not None:
        return "finished"
    whole = [file.parent for file in folder.checkpoints.glob(f"*/{MANIFEST_FILE}")]
    steps = [step for step in map(step_of, whole) if step is not None]
    return f"last checkpoint at step {max(steps)}" if steps else "no checkpoint yet"


def write_job(folder: RunFolder, job: str) -> None:
    """Remembers the scheduler's name of the run's last job."""
    write_atomically(folder.path / _JOB_FILE, json.dumps({"job": job}).encode())


def read_job(folder: RunFolder) -> str | None:
    """What `write_job` wrote last; None if nothing was ever submitted."""
    file = folder.path / _JOB_FILE
    return str(json.loads(file.read_text())["job"]) if file.exists() else None


def launched(path: Path) -> RunConfig:
    """Settings of the run that was last launched in a folder, wherever it was launched from.

    Raises:
        UserError: none was, or it was moved.
    """
    file = RunFolder(path).launch_file
    if not file.exists():
        raise UserError(f"{path}: no run was launched here", "give the folder of a run, such as runs/ml1m")
    config, folder = load(file), Path(os.path.abspath(path))
    if folder.name != config.name:
        raise UserError(f"{path}: holds the run {config.name} under another name", f"name the folder {config.name}")
    # a relative `output` is that of the folder it was launched in
    return replace(config, output=str(folder.parent))


def find_program(name: str) -> None:
    """Whether this machine has a program.

    Raises:
        UserError: it does not.
    """
    if shutil.which(name) is None:
        raise UserError(f"{name}: no such program here", "launch from a machine of the cluster, or give dry_run=true")


def call(command: Sequence[str], text: str | None = None) -> str:
    """Output of a scheduler's client program.

    Args:
        command: program and arguments.
        text: its standard input.

    Raises:
        UserError: it is not installed here, or it failed; its own first line says why.
    """
    find_program(command[0])
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        why = lines[0].removeprefix(f"{command[0]}: ")
        raise UserError(f"{command[0]}: {why}", "correct the cluster.* settings, or ask the cluster's manual")
    return done.stdout
