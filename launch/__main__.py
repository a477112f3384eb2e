"""The command line: `python -m launch experiment=NAME cluster=local nproc=2 [key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hstu_dist.config import RunConfig, compose, groups_help
from hstu_dist.console import report, say
from hstu_dist.errors import ExitCode, UserError
from launch import hosts, kubernetes, local, multirun, slurm
from launch.run_files import finished_text, launched
from launch.spec import Program

_SHORT = {"nodes": ("cluster.nodes={}",), "gpus": ("nproc={}", "trainer.device=cuda")}
"""Words for what a launch is asked for most; nodes are machines, gpus those of each machine, one a rank."""


@dataclass(frozen=True)
class Kind:
    """One kind of cluster.

    Attributes:
        preview: what `start` would run.
        start: starts the run or hands it to a scheduler; returns the exit code.
        status, logs, cancel: text for the user about a run that was launched.
        is_submitted: whether a scheduler has the run, waiting or running.
    """

    preview: Callable[[RunConfig, Program], str]
    start: Callable[[RunConfig, Program], int]
    status: Callable[[RunConfig], str]
    logs: Callable[[RunConfig], str]
    cancel: Callable[[RunConfig], str]
    is_submitted: Callable[[RunConfig], bool] = lambda config: False


KINDS: Mapping[str, Kind] = {
    # ranks of one machine leave the same traces as those of several without a scheduler
    "local": Kind(local.preview, local.start, hosts.status, hosts.logs, hosts.cancel),
    "hosts": Kind(hosts.preview, hosts.start, hosts.status, hosts.logs, hosts.cancel),
    "slurm": Kind(slurm.preview, slurm.start, slurm.status, slurm.logs, slurm.cancel, slurm.is_submitted),
    "kubernetes": Kind(
        kubernetes.preview,
        kubernetes.start,
        kubernetes.status,
        kubernetes.logs,
        kubernetes.cancel,
        kubernetes.is_submitted,
    ),
}
_QUESTIONS: Mapping[str, Callable[[Kind], Callable[[RunConfig], str]]] = {
    "status": lambda kind: kind.status,
    "logs": lambda kind: kind.logs,
    "cancel": lambda kind: kind.cancel,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks a run, then starts it; returns the exit code.

    0: finished, now or before, or handed to a scheduler; 1: a rank failed; 2: bad input; 75: stopped by `cancel`;
    128 + signal: stopped by it. A run that was stopped has saved a checkpoint.
    """
    options = _parser().parse_intermixed_args(arguments)
    try:
        if options.words and options.words[0] in _QUESTIONS:
            if options.dry_run or options.multirun:
                raise UserError(f"{options.words[0]}: takes no options", f"give `{options.words[0]} FOLDER` alone")
            return _ask(options.words)
        overrides, dry_run_key = _split_dry_run(options.words)
        dry_run = dry_run_key or options.dry_run
        if options.jobs is not None and not options.multirun:
            raise UserError(f"--jobs: got {options.jobs} for a single run", "add --multirun, or leave it out")
        if overrides and overrides[0] == "doctor":
            if options.multirun:
                raise UserError("doctor: takes no --multirun", "give the settings of one run")
            return _doctor(_in_full(overrides[1:]), dry_run)
        if options.multirun:
            return multirun.run(_in_full(overrides), options.jobs, _preview if dry_run else None, _is_submitted)
        return _launch(_in_full(overrides), dry_run)
    except UserError as error:
        report(error)
        return ExitCode.BAD_INPUT


def _launch(overrides: Sequence[str], dry_run: bool) -> int:
    config = compose(overrides)
    if dry_run:
        say(_preview(config))
        return ExitCode.FINISHED
    finished = finished_text(config)
    if finished is not None:
        # also says so if the data has gone since
        say(finished)
        return ExitCode.FINISHED
    return KINDS[config.cluster.kind].start(config, "train")


def _doctor(overrides: Sequence[str], dry_run: bool) -> int:
    """Starts `python -m hstu_dist doctor` where a run would start its ranks, with a folder of its own."""
    config = compose([*overrides, "name=doctor", "cluster.max_restarts=0"])
    kind = KINDS[config.cluster.kind]
    if dry_run:
        say(kind.preview(config, "doctor"))
        return ExitCode.FINISHED
    return kind.start(config, "doctor")


def _preview(config: RunConfig) -> str:
    return KINDS[config.cluster.kind].preview(config, "train")


def _is_submitted(config: RunConfig) -> bool:
    return KINDS[config.cluster.kind].is_submitted(config)


def _ask(words: Sequence[str]) -> int:
    if len(words) != 2:
        raise UserError(f"{words[0]}: got {len(words) - 1} arguments", f"give `{words[0]} FOLDER` with a run's folder")
    path = Path(words[1])
    config = launched(path)
    say(_QUESTIONS[words[0]](KINDS[config.cluster.kind])(config))
    return ExitCode.FINISHED


def _in_full(overrides: Sequence[str]) -> list[str]:
    full: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        given = [template.format(value) for template in _SHORT[key]] if key in _SHORT else [override]
        full.extend(word for one in given for word in _split_range(one))
    return full


def _split_range(override: str) -> list[str]:
    """`cluster.nodes=2:4` as the fewest and the most machines of an elastic run."""
    key, _, value = override.partition("=")
    fewest, colon, most = value.partition(":")
    return [f"cluster.min_nodes={fewest}", f"{key}={most}"] if key == "cluster.nodes" and colon else [override]


def _split_dry_run(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Overrides of the run, and whether `dry_run=true` is among the arguments."""
    overrides, dry_run = [], False
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key != "dry_run":
            overrides.append(argument)
        elif value in ("true", "false"):
            dry_run = value == "true"
        else:
            raise UserError(f"dry_run: got {value!r}, expected true or false", "give dry_run=true to print the command")
    return overrides, dry_run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description="Starts the ranks of a run. A run that was stopped continues; a finished one shows its result.\n"
        "`status FOLDER`, `logs FOLDER` and `cancel FOLDER` ask about a run that was launched; `doctor key=value ...`\n"
        "starts a report on machines, packages and network in the place of the run.",
        epilog=groups_help(),
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="key=value",
        help="settings, in Hydra's override syntax:\n"
        "experiment=NAME  a whole recipe\n"
        "cluster=NAME     where the ranks run\n"
        "nproc=N          ranks of each machine\n"
        "gpus=N           the same, each rank on a GPU\n"
        "nodes=N          machines, where cluster=NAME has several\n"
        "nodes=MIN:MAX    the same; the run goes on with MIN when others are lost\n"
        "output=FOLDER    folder of all runs\n"
        "dry_run=true     print what would start the ranks; do nothing",
    )
    parser.add_argument("--dry-run", action="store_true", help="the same as dry_run=true")
    parser.add_argument("-m", "--multirun", action="store_true", help="a run for each combination: KEY=A,B,C")
    parser.add_argument(
        "--jobs", type=int, help="runs of a multirun at the same time (default: hydra.launcher.jobs, 1)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
