"""How much longer `python -m launch` takes to the first step than plain torchrun with the same ranks."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import psutil

from benchmarks.environment import ROOT, describe
from benchmarks.fault_run import RUN, prepared_data
from benchmarks.harness import Samples, turns
from benchmarks.options import positive
from hstu_dist.errors import UserError
from hstu_dist.report.results import Ratio, Results, Row, write
from hstu_dist.train.metrics_file import METRICS_FILE

log = logging.getLogger(__name__)

_TARGET_SECONDS = 2.0
_DEADLINE_SECONDS = 120.0
_CASE = "2 ranks, first step"
_COMMANDS: Mapping[str, Sequence[str]] = {
    "torchrun": ("-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "hstu_dist", "train"),
    "launch": ("-m", "launch"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--rounds", type=positive, default=7, help="after an untimed one (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measures and writes the result file."""
    folder = ROOT / "runs" / "launch"
    data = prepared_data(folder)
    seconds: dict[str, list[float]] = {name: [] for name in _COMMANDS}
    for number, name in enumerate(turns(tuple(_COMMANDS), 1 if options.quick else options.rounds + 1)):
        took = first_step(_COMMANDS[name], data, folder / "run")
        log.info("%s: %.2f s", name, took)
        # the first round reads the packages from disk
        if options.quick or number >= len(_COMMANDS):
            seconds[name].append(took)
    results = Results(
        name="launch",
        command=options.command,
        rows=tuple(rows_of(seconds)),
        ratios=(ratio_of(seconds),),
        **asdict(describe(options.device)),
    )
    log.info("written to %s", write(results, options.output))
    return 0


def first_step(command: Sequence[str], data: Path, folder: Path) -> float:
    """Seconds from the start of a command to the first step in the run's log; the run is ended then.

    Raises:
        UserError: it ended before, or took too long.
    """
    shutil.rmtree(folder, ignore_errors=True)
    words = [*RUN, f"data.path={data}", f"output={folder}", "nproc=2"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not any(path.stat().st_size for path in folder.glob(f"*/{METRICS_FILE}")):
            if process.poll() is not None or time.perf_counter() - started > _DEADLINE_SECONDS:
                raise UserError(f"{' '.join(command)}: no first step", "run it by hand to see why")
            time.sleep(0.005)
        return time.perf_counter() - started
    finally:
        for below in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                below.kill()
        process.kill()
        process.wait()


def overheads(seconds: Mapping[str, Sequence[float]]) -> Samples:
    """Seconds of the launch on top of torchrun's, round by round."""
    pairs = zip(seconds["launch"], seconds["torchrun"], strict=True)
    return Samples(tuple(ours - plain for ours, plain in pairs))


def rows_of(seconds: Mapping[str, Sequence[float]]) -> Iterator[Row]:
    """Seconds of both, and the difference."""
    for name, values in seconds.items():
        yield Samples(tuple(values)).row(_CASE, name, "seconds_to_first_step", "s")
    yield overheads(seconds).row(_CASE, "launch", "overhead", "s")


def ratio_of(seconds: Mapping[str, Sequence[float]]) -> Ratio:
    """The target over the overhead."""
    # none at all would divide by zero
    overhead = max(overheads(seconds).median, 0.01)
    return Ratio(case=_CASE, metric="overhead", a="2 s", b="launch", value=_TARGET_SECONDS / overhead, target=1.0)
