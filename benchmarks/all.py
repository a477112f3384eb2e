"""Every benchmark in turn, a process each, and a summary; what is finished is skipped when the command is repeated."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from benchmarks import environment
from benchmarks.__main__ import BENCHMARKS
from benchmarks.cells import Cells, Findings
from benchmarks.environment import ROOT
from benchmarks.harness import Samples
from benchmarks.options import positive
from hstu_dist.errors import UserError
from hstu_dist.report.results import load

log = logging.getLogger(__name__)

LEFT_OUT = ("ml1m", "appendix_c", "scaling", "external", "all", "gpu")
"""Hours long, in need of a command, this one, what runs this one."""

_GRACE_SECONDS = 20.0
"""How long an interrupted benchmark may take to end by itself."""


@dataclass(frozen=True)
class Outcome:
    """How one benchmark ended.

    Attributes:
        name: which.
        state: in words.
        succeeded: whether its figures are there.
        seconds: it took, now or when it was measured.
        files: result files that it wrote now.
    """

    name: str
    state: str
    succeeded: bool
    seconds: float = 0.0
    files: tuple[str, ...] = ()


class _FailedError(Exception):
    """A benchmark ended with an error; nothing of it is stored."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    known = [name for name in BENCHMARKS if name not in ("all", "gpu")]
    # under another name: each of them is measured whole
    parser.add_argument("--only", dest="names", nargs="+", choices=known, metavar="NAME", help="these, in this order")
    parser.add_argument("--skip", nargs="+", choices=known, default=[], metavar="NAME", help="all but these")
    parser.add_argument("--within", type=positive, metavar="MINUTES", help="stop then; what is left is named")


def run(options: argparse.Namespace) -> int:
    """Runs them and prints the summary.

    Returns:
        0 if all of them have their figures; 1 if one failed or had no time.
    """
    names = [n for n in options.names or [n for n in BENCHMARKS if n not in LEFT_OUT] if n not in options.skip]
    if not names:
        raise UserError("all: got nothing to run", "leave out --skip, or name some with --only")
    deadline = time.monotonic() + 60 * options.within if options.within else None
    # apart from what an interrupted run of all of them has finished, and will look for
    chosen = "_".join(("all", *options.names)) if options.names else "all"
    cells = Cells(options.scratch / f"{chosen}_finished", _stamp(options))
    outcomes = []
    with _terminated_as_interrupted():
        for name in names:
            outcomes.append(_outcome(name, options, cells, deadline))
            log.info("%s: %s", name, outcomes[-1].state)
    sys.stdout.write(summary(outcomes, options.output))
    if not all(outcome.succeeded for outcome in outcomes):
        sys.stdout.write("the same command runs again what has no figures yet\n")
        return 1
    cells.clear()
    return 0


def _stamp(options: argparse.Namespace) -> dict[str, str]:
    here = environment.describe(options.device)
    flags = " ".join(_flags(options))
    return {
        **here.versions,
        "code": environment.source_hash(),
        "device": here.device,
        "threads": str(here.threads),
        "flags": flags,
    }


def _flags(options: argparse.Namespace) -> list[str]:
    flags = ["--device", options.device.type]
    if options.threads is not None:
        flags += ["--threads", str(options.threads)]
    if options.quick:
        flags += ["--quick", "--output", str(options.output)]
    elif options.output != environment.RESULTS:
        flags += ["--output", str(options.output)]
    return flags


def _outcome(name: str, options: argparse.Namespace, cells: Cells, deadline: float | None) -> Outcome:
    before = _stamps_of_files(options.output)
    left = None if deadline is None else deadline - time.monotonic()
    measured_now = False

    def measure() -> Findings:
        nonlocal measured_now
        measured_now = True
        if left is not None and left <= 0:
            raise _FailedError("no time left")
        started = time.monotonic()
        command = [sys.executable, "-m", "benchmarks", name, *_flags(options)]
        status = run_group(command, left)
        if status != 0:
            raise _FailedError("out of time" if status is None else f"failed with exit code {status}")
        return Findings(rows=[Samples((time.monotonic() - started,)).row("all", name, "time", "s")])

    try:
        seconds = cells.measure(name, measure).rows[0].value
        state, succeeded = "measured" if measured_now else "already measured", True
    except _FailedError as failure:
        seconds, state, succeeded = 0.0, str(failure), False
    after = _stamps_of_files(options.output)
    changed = tuple(file for file, stamp in after.items() if before.get(file) != stamp)
    return Outcome(name, state, succeeded, seconds, changed)


def _stamps_of_files(folder: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in sorted(folder.glob("*.json"))}


def run_group(command: Sequence[str], seconds: float | None) -> int | None:
    """Runs a command in a process group of its own, so that none of its processes outlives it.

    Args:
        command: program and arguments.
        seconds: it may take; None: any time.

    Returns:
        Its exit code; None if it took too long.
    """
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupts what still runs in a group, then kills it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the running benchmark as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def summary(outcomes: Sequence[Outcome], folder: Path) -> str:
    """Markdown: a line per benchmark, with how many of its targets the files that it wrote meet."""
    lines = ["| benchmark | state | minutes | targets met | files |", "| --- | --- | ---: | ---: | --- |"]
    for outcome in outcomes:
        held = [ratio.met for file in outcome.files for ratio in load(file, folder).ratios if ratio.met is not None]
        targets = f"{sum(held)} of {len(held)}" if held else ""
        minutes = f"{outcome.seconds / 60:.1f}" if outcome.seconds else ""
        lines.append(f"| {outcome.name} | {outcome.state} | {minutes} | {targets} | {', '.join(outcome.files)} |")
    return "\n".join(lines) + "\n"
