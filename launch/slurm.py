"""Slurm: a batch script that starts one agent a node, saves before the time limit and queues itself again."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from hstu_dist.cluster import SlurmConfig
from hstu_dist.config import RunConfig
from hstu_dist.console import say
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.files import write_atomically
from hstu_dist.run_folder import RunFolder
from launch.hosts import tail
from launch.node import NodeArguments
from launch.run_files import call, checked_folder, find_program, progress, read_job, write_job
from launch.spec import Program

_ENDPOINT, _RUN_ID = "ADDRESS:PORT", "RUN_ID"
"""Words in whose place the shell puts what it knows."""

_BODY = r"""
cd {here} || exit 1
run={run}
rm -f "$run/stop"
# near the time limit the ranks find this file, save and end well; then the job goes back into the queue
stopping= interrupted=
ask_to_stop() {{ stopping=yes interrupted=yes; touch "$run/stop"; }}
trap ask_to_stop USR1
{setup}
# this script runs on the first node; its address is the one that Slurm itself uses
address=$(scontrol show node "$SLURMD_NODENAME" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
port={port}
srun {srun}&
ranks=$!
# the trap ends a wait early
while :; do
  interrupted=
  wait "$ranks"
  code=$?
  [ -n "$interrupted" ] || break
done

if {{ [ "$code" -eq 0 ]{or_elastic}; }} && [ -e "$run/stop" ]; then
  rm -f "$run/stop"
  if [ -n "$stopping" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    # for clusters that requeue by exit code (RequeueExit)
    exit {stopped}
  fi
fi
exit "$code"
"""


def script(config: RunConfig, program: Program = "train") -> str:
    """The batch script of a run."""
    cluster = _cluster(config)
    folder = RunFolder(config.run_dir.absolute())
    body = _BODY.format(
        here=shlex.quote(str(Path.cwd())),
        run=shlex.quote(str(folder.path)),
        setup="".join(f"{line}\n" for line in cluster.setup),
        # jobs that share a node must not share a port
        port=cluster.port or "$((20000 + SLURM_JOB_ID % 10000))",
        srun=_srun(cluster, folder, program),
        stopped=int(ExitCode.STOPPED),
        # the code is the worst of all nodes; one of an elastic job may have failed long before
        or_elastic=' || [ -n "$stopping" ]' if cluster.least_nodes < cluster.nodes else "",
    )
    lines = [f"#SBATCH {option}" for option in _options(config, folder)]
    return "\n".join(["#!/bin/bash", *lines, body.lstrip("\n")])


def _options(config: RunConfig, folder: RunFolder) -> Iterator[str]:
    cluster = _cluster(config)
    yield f"--job-name={config.name}"
    yield f"--nodes={cluster.nodes}"
    yield "--ntasks-per-node=1"
    if cluster.cpus_per_rank is not None:
        yield f"--cpus-per-task={cluster.cpus_per_rank * config.nproc}"
    if cluster.memory_gib is not None:
        yield f"--mem={int(cluster.memory_gib * 1024)}M"
    if config.trainer.device == "cuda":
        yield f"--gpus-per-node={config.nproc}"
    if cluster.partition is not None:
        yield f"--partition={cluster.partition}"
    if cluster.account is not None:
        yield f"--account={cluster.account}"
    if cluster.time_limit is not None:
        yield f"--time={cluster.time_limit}"
    # to this script only: the agents would die of it
    yield f"--signal=B:USR1@{cluster.stop_seconds}"
    yield "--requeue"
    if cluster.least_nodes < cluster.nodes:
        yield "--no-kill"
    yield "--open-mode=append"
    yield f"--output={shlex.quote(str(folder.logs))}/slurm-%j.out"
    yield from cluster.sbatch


def _srun(cluster: SlurmConfig, folder: RunFolder, program: Program) -> str:
    """Options of the step and the command of a node; the shell fills in address, port and job number."""
    arguments = NodeArguments(
        config_file=folder.launch_file,
        endpoint=_ENDPOINT,
        run_id=_RUN_ID,
        node="SLURM_NODEID",
        logs=folder.logs,
        program=program,
    )
    # an elastic job outlives a node and the tasks on it
    elastic = cluster.least_nodes < cluster.nodes
    ending = ["--kill-on-bad-exit=0", "--no-kill"] if elastic else ["--kill-on-bad-exit=1"]
    # srun does not inherit the cores of the job's tasks
    cpus = [] if cluster.cpus_per_rank is None else ['--cpus-per-task="$SLURM_CPUS_PER_TASK"']
    words = [*cluster.srun, *arguments.words(cluster.python or [sys.executable])]
    filled = {_ENDPOINT: '"$address:$port"', _RUN_ID: '"$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"'}
    return " ".join([*ending, *cpus, *(filled.get(word, shlex.quote(word)) for word in words), ""])


def preview(config: RunConfig, program: Program = "train") -> str:
    """The batch script that `start` would submit."""
    return script(config, program)


def start(config: RunConfig, program: Program = "train") -> int:
    """Submits the job, unless one of this run is still in the queue; returns the exit code."""
    folder = RunFolder(config.run_dir)
    job = read_job(folder)
    if job is not None and is_submitted(config):
        raise UserError(
            f"run {folder.path}: job {job} is still in the queue ({_state(job)})",
            f"wait for it, or `python -m launch cancel {folder.path}`",
        )
    # before anything is written
    find_program("sbatch")
    folder = checked_folder(config, program)
    folder.logs.mkdir(exist_ok=True)
    file = folder.path / "slurm.sh"
    write_atomically(file, script(config, program).encode())
    # a cluster's name follows the number after a semicolon
    job = call(["sbatch", "--parsable", str(file)]).strip().split(";")[0]
    write_job(folder, job)
    say(f"submitted job {job}; `python -m launch status|logs|cancel {folder.path}`")
    return ExitCode.FINISHED


def is_submitted(config: RunConfig) -> bool:
    """Whether the run's last job is in the queue or runs."""
    job = read_job(RunFolder(config.run_dir))
    return job is not None and _state(job) is not None


def status(config: RunConfig) -> str:
    """What Slurm says of the run's last job, and how far the run has come."""
    job = _submitted(config)
    return f"job {job}: {_state(job) or 'no longer in the queue'}; {progress(config)}"


def cancel(config: RunConfig) -> str:
    """Takes a waiting job out of the queue; asks the ranks of a running one to save and stop."""
    job = _submitted(config)
    state = _state(job)
    if state is None:
        raise UserError(f"job {job}: no longer in the queue", "nothing to cancel")
    if state.startswith("RUNNING"):
        RunFolder(config.run_dir).stop_file.touch()
        return f"job {job}: asked to save a checkpoint and stop; `scancel {job}` ends it at once"
    call(["scancel", job])
    return f"job {job}: cancelled before it ran"


def logs(config: RunConfig) -> str:
    """The end of the job's output, which has that of all ranks."""
    job = _submitted(config)
    file = RunFolder(config.run_dir).logs / f"slurm-{job}.out"
    return tail(file, lines=100) if file.exists() else f"job {job}: has not written anything yet"


def _submitted(config: RunConfig) -> str:
    job = read_job(RunFolder(config.run_dir))
    if job is None:
        raise UserError(f"run {config.run_dir}: no job was submitted", "launch it first")
    return job


def _state(job: str) -> str | None:
    """State and reason as squeue words them; None for a job that it no longer knows."""
    try:
        return call(["squeue", "--noheader", "--jobs", job, "--format=%T %r"]).strip() or None
    except UserError as error:
        if "Invalid job id" in error.problem:
            return None
        raise


def _cluster(config: RunConfig) -> SlurmConfig:
    assert isinstance(config.cluster, SlurmConfig)
    return config.cluster
