"""The command line: `python -m launch experiment=NAME cluster=local nproc=2 [key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hstu_dist.commands.result_table import finished_report
from hstu_dist.config import compose, groups_help, save
from hstu_dist.console import report, say
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.preflight import preflight
from hstu_dist.run_folder import RunFolder
from launch import local
from launch.spec import LaunchSpec
from launch.torchrun import agent_command, agent_environment, as_shell


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks a run, then starts it; returns the exit code.

    0: finished, now or before; 1: a rank failed; 2: bad input; 128 + signal: stopped by it, after saving a checkpoint.
    """
    options = _parser().parse_args(arguments)
    try:
        return _launch(options.overrides, options.dry_run)
    except UserError as error:
        report(error)
        return ExitCode.BAD_INPUT


def _launch(arguments: Sequence[str], dry_run: bool) -> int:
    overrides, dry_run_key = _split_dry_run(arguments)
    config = compose(overrides)
    spec = LaunchSpec.of(config)
    command, environment = agent_command(spec), agent_environment(spec)
    if dry_run or dry_run_key:
        say(as_shell(command, environment))
        return ExitCode.FINISHED
    preflight(config, config.nproc)
    folder = RunFolder(config.run_dir)
    result = folder.finished(config.trainer.last_epoch)
    if result is not None:
        say(finished_report(config, result))
        return ExitCode.FINISHED
    save(config, folder.launch_file)
    return local.run(command, environment)


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
        description="Starts the ranks of a run. A run that was stopped continues; a finished one shows its result.",
        epilog=groups_help(),
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings, in Hydra's override syntax:\n"
        "experiment=NAME  a whole recipe\n"
        "cluster=NAME     where the ranks run\n"
        "nproc=N          ranks\n"
        "output=FOLDER    folder of all runs\n"
        "dry_run=true     print the command that would start the ranks; do nothing",
    )
    parser.add_argument("--dry-run", action="store_true", help="the same as dry_run=true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
