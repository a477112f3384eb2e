"""The command line: `python -m hstu_dist COMMAND [key=value ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hstu_dist import __version__
from hstu_dist.config import RunConfig, compose, compose_dict, groups_help, hardware_names, load
from hstu_dist.console import leave_word, note, report, say
from hstu_dist.errors import ExitCode, PeerLostError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    options = _parser().parse_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    _quiet_libraries(rank)
    command: Callable[[argparse.Namespace], ExitCode | None] = options.run
    try:
        return command(options) or ExitCode.FINISHED
    except UserError as error:
        if options.debug:
            raise
        report(error)
        return ExitCode.BAD_INPUT
    except PeerLostError as error:
        if options.debug:
            raise
        note(str(error))
        leave_word(str(error))
        return ExitCode.PEER_LOST


def _quiet_libraries(rank: int) -> None:
    """Our own progress on rank 0; of the libraries only what goes wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("hstu_dist").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # fx warns whenever TorchRec asks it whether it is tracing
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    # TorchRec hands out ShardedTensor, which torch wants replaced by DTensor
    warnings.filterwarnings("ignore", message="Please use DTensor", category=FutureWarning)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hstu_dist", description="Trains HSTU generative recommenders.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary, function in (
        ("prepare", "fetch or read events and write them as sequences", _prepare),
        ("train", "train a run, or continue it", _train),
        ("evaluate", "rank the whole corpus with a run's best checkpoint", _evaluate),
        ("plan", "memory and least time of a run on a cluster that need not exist (cluster=NAME)", _plan),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=_epilog(name),
            formatter_class=argparse.RawTextHelpFormatter,
        )
        command.set_defaults(run=function)
        command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, in Hydra's override syntax")
        command.add_argument("--debug", action="store_true", help="show the stack trace of an error")
        if name == "plan":
            command.add_argument("--folder", type=Path, help="of the JSON file and plots (default: OUTPUT/plans)")
        if name in ("train", "evaluate"):
            command.add_argument("--config", type=Path, help="a resolved config.yaml instead of overrides")
        if name == "evaluate":
            command.add_argument("--split", choices=("validation", "test"), default="test", help="default: test")
    summary = "a page about a run, or about several beside each other; or the pages of committed result files"
    report_command = commands.add_parser("report", help=summary, description=summary)
    report_command.set_defaults(run=_report)
    report_command.add_argument(
        "what", nargs="+", metavar="RUN", help="run folders; or `results`: README.md, docs/results.md and plots"
    )
    report_command.add_argument(
        "--output", type=Path, metavar="FILE", help="of runs (default: report.html, of one run in its folder)"
    )
    report_command.add_argument("--root", type=Path, help="checkout of the results (default: the current folder)")
    report_command.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    summary = "compute a refused step again and say where it left the finite numbers"
    replay_command = commands.add_parser("replay", help=summary, description=summary)
    replay_command.set_defaults(run=_replay)
    replay_command.add_argument("folder", type=Path, help="RUN/replay/step-NNNNNNNN")
    replay_command.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    _add_scale(commands)
    _add_doctor(commands)
    _add_checkpoint(commands)
    _add_uses(commands)
    return parser


def _epilog(command: str) -> str:
    """What the overrides of a command choose from."""
    if command == "plan":
        of_the_run = groups_help(["data", "embedding", "experiment", "loss", "model", "trainer"])
        return f"clusters (cluster=NAME): {' | '.join(hardware_names())}\nof the run, {of_the_run}"
    return groups_help(["data"] if command == "prepare" else None)


def _add_scale(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "fit scaling laws to a sweep, or say what a value would take"
    command = commands.add_parser("scale", help=summary, description=summary)
    command.set_defaults(run=_scale)
    command.add_argument("what", choices=("fit", "plan"), help="fit: laws of all families; plan: invert them")
    command.add_argument("sweep", type=Path, help="folder of the runs, such as runs/scaling")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="of plan: cluster=NAME, and of the run")
    command.add_argument("--metric", default="loss", help="of the test split, such as hr@10 (default: loss)")
    command.add_argument("--target", "--target-loss", type=float, metavar="X", help="of plan: the value to reach")
    command.add_argument("--output", type=Path, metavar="FOLDER", help="of fit (default: SWEEP/fit)")
    command.add_argument("--debug", action="store_true", help="show the stack trace of an error")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "say what of packages, machine, folders and network is wrong, and how to mend it"
    command = commands.add_parser(
        "doctor",
        help=summary,
        description=f"{summary}. Exit code 2 if anything keeps a run from working. Started by "
        "`python -m launch doctor`, on several machines, it measures what lies between all of their ranks.",
    )
    command.set_defaults(run=_doctor)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="of the run whose folders count")
    command.add_argument(
        "--config", type=Path, help="resolved settings instead, as `python -m launch doctor` gives them"
    )
    command.add_argument(
        "--ranks", type=int, help="local ranks that talk to each other; 0: none (default: 2, on GPUs at most nproc)"
    )
    command.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    command.add_argument("--debug", action="store_true", help="show the stack trace of an error")


def _add_checkpoint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = "look at checkpoints, or rewrite their files, without starting ranks"
    command = commands.add_parser(
        "checkpoint",
        help=summary,
        description=f"{summary}. Any number of ranks, under any sharding, continues from a checkpoint as it is: "
        "reshard only makes as many files as there will be readers.",
    )
    command.set_defaults(run=_checkpoint)
    command.add_argument(
        "what",
        choices=("inspect", "verify", "reshard", "export"),
        help="inspect: step and tensors; verify: all checksums; export: weights as one safetensors file; "
        "reshard: the files as --ranks ranks would have written them",
    )
    command.add_argument("path", type=Path, help="a run's folder or one of its checkpoints/step-NNNNNNNN")
    command.add_argument("output", type=Path, nargs="?", help="of export: the new file")
    command.add_argument("--ranks", type=int, help="of reshard: how many")
    command.add_argument("--debug", action="store_true", help="show the stack trace of an error")


def _add_uses(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Commands that use a trained run."""
    for name, summary in (
        ("score", "score the candidates of a Parquet file of requests"),
        ("retrieve", "find the best items of the corpus for a Parquet file of histories"),
        ("export", "write the tower as packages that need nothing of hstu_dist"),
        ("serve", "answer requests over HTTP"),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}, with a run's best checkpoint, on one process",
            epilog=f"settings of {name}, their defaults and meaning: conf/{name}.yaml",
        )
        command.set_defaults(run=_use, command=name)
        command.add_argument(
            "words", nargs="+", metavar="RUN | key=value", help="the run's folder, or its settings; settings of the use"
        )
        command.add_argument("--debug", action="store_true", help="show the stack trace of an error")


def _run_config(options: argparse.Namespace) -> RunConfig:
    if options.config is None:
        return compose(options.overrides)
    if options.overrides:
        raise UserError(
            f"--config and {options.overrides[0]}: a resolved configuration takes no overrides", "give one of the two"
        )
    return load(options.config)


# torch takes seconds to import: commands that do not need it, and --help, stay without it


def _prepare(options: argparse.Namespace) -> None:
    from hstu_dist.commands.prepare import prepare_data

    prepare_data(compose_dict("prepare", options.overrides), say)


def _train(options: argparse.Namespace) -> ExitCode:
    config = _run_config(options)
    from hstu_dist.commands.train import train

    return train(config, say)


def _replay(options: argparse.Namespace) -> None:
    from hstu_dist.commands.replay import replay

    replay(options.folder, say)


def _evaluate(options: argparse.Namespace) -> None:
    config = _run_config(options)
    from hstu_dist.commands.evaluate import evaluate_run
    from hstu_dist.data.split import Split

    evaluate_run(config, Split(options.split), say)


def _plan(options: argparse.Namespace) -> None:
    from hstu_dist.commands.plan import plan_run

    plan_run(options.overrides, options.folder, say)


def _scale(options: argparse.Namespace) -> None:
    from hstu_dist.commands.scale import fit, plan

    if (options.what == "plan") != (options.target is not None):
        raise UserError(f"scale {options.what}: got --target {options.target}", "plan needs a value to reach, fit none")
    if options.what == "fit":
        if options.overrides:
            raise UserError(f"scale fit: got {options.overrides[0]}", "give the folder of the sweep alone")
        fit(options.sweep, options.metric, options.output, say)
    else:
        plan(options.sweep, options.metric, options.target, options.overrides, say)


def _doctor(options: argparse.Namespace) -> ExitCode:
    from hstu_dist.commands.doctor import DoctorOptions, examine

    config = compose(["name=doctor", *options.overrides]) if options.config is None else _run_config(options)
    return examine(config, DoctorOptions(options.overrides, options.ranks, options.json), say)


def _report(options: argparse.Namespace) -> None:
    from hstu_dist.commands.report import report_results, report_runs

    results = options.what == ["results"]
    if results and options.output is not None:
        raise UserError(f"report results: got --output {options.output}", "it writes into the checkout, see --root")
    if not results and options.root is not None:
        raise UserError(f"report {options.what[0]}: got --root {options.root}", "give it with `results` alone")
    if results:
        report_results(options.root or Path(), say)
    else:
        report_runs([Path(run) for run in options.what], options.output, say)


def _checkpoint(options: argparse.Namespace) -> None:
    from hstu_dist.commands.checkpoint import export, inspect, reshard, verify

    if (options.what == "export") != (options.output is not None):
        raise UserError(
            f"checkpoint {options.what}: got output {options.output}", "export needs an output file, the others none"
        )
    if (options.what == "reshard") != (options.ranks is not None):
        raise UserError(
            f"checkpoint {options.what}: got --ranks {options.ranks}",
            "reshard needs their number, the others none",
        )
    if options.what == "reshard":
        reshard(options.path, options.ranks, say)
    elif options.what == "export":
        export(options.path, options.output, say)
    elif options.what == "verify":
        verify(options.path, say)
    else:
        inspect(options.path, say)


def _use(options: argparse.Namespace) -> None:
    """A command of `_add_uses`; wrong settings are named before torch is there."""
    from hstu_dist.commands.use import USES, Words

    words = Words[Any].of(options.command, USES[options.command], options.words)
    from hstu_dist.commands import export, score, serve

    commands: dict[str, Callable[[Words[Any], Callable[[str], None]], None]] = {
        "score": score.score_file,
        "retrieve": score.retrieve_file,
        "export": export.export_run,
        "serve": serve.serve_run,
    }
    commands[options.command](words, say)


if __name__ == "__main__":
    sys.exit(main())
