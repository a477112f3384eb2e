"""Preparing event logs of any size: seconds and memory by events and by memory limit, and reading the result back."""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.environment import ROOT, describe
from benchmarks.harness import Samples
from hstu_dist.data.synthetic import power_law, scattered
from hstu_dist.report.results import Ratio, Results, Row, write

log = logging.getLogger(__name__)

MILLION = 1_000_000
_EVENTS_PER_USER, _EVENTS_PER_ITEM = 25, 100
_EVENTS_PER_FILE = 5 * MILLION
_POLL_SECONDS = 0.02
GIB = 2**30

READ_BACK = "an epoch of batches of 128 from the mapped data set"
_READ_RATE, _READ_BYTES = 8e6, 500e6


@dataclass(frozen=True)
class Setting:
    """One preparation.

    Attributes:
        events: of the log.
        memory_gib: as the command gets it.
        seconds: the target; None: only part of the growth law.
        bytes: the target.
    """

    events: int
    memory_gib: float
    seconds: float | None = None
    bytes: float | None = None

    @property
    def case(self) -> str:
        """Name in the result file."""
        events, users = self.events / MILLION, self.events // _EVENTS_PER_USER / MILLION
        return f"{events:g} million events of {users:g} million users, Zipf, memory_gib={self.memory_gib:g}"


SETTINGS = (
    Setting(100 * MILLION, 3.8, seconds=60, bytes=4.2e9),
    Setting(100 * MILLION, 1.2, seconds=100, bytes=1.5e9),
    Setting(50 * MILLION, 1.2),
    Setting(200 * MILLION, 1.2),
)
QUICK = (Setting(MILLION // 5, 1.0, seconds=60, bytes=4.2e9), Setting(MILLION // 10, 1.0))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where the logs are."""
    parser.add_argument("--logs", type=Path, help="folder where the logs are made and kept (default: a temporary one)")


def run(options: argparse.Namespace) -> int:
    """Measures each preparation as a process of its own and writes the result file."""
    settings = QUICK if options.quick else SETTINGS
    rows: list[Row] = []
    ratios: list[Ratio] = []
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as scratch:
        logs = options.logs or Path(scratch) / "logs"
        measured = {}
        for index, setting in enumerate(settings):
            make_log(logs, setting.events)
            target = Path(scratch) / f"set-{index}"
            measured[setting] = _prepare(setting, logs, target, torch.get_num_threads())
            more_rows, more_ratios = _of_preparation(setting, measured[setting])
            if setting is settings[0]:
                read_rows, read_ratios = _read_back(setting, target)
                more_rows, more_ratios = more_rows + read_rows, more_ratios + read_ratios
            rows += more_rows
            ratios += more_ratios
            shutil.rmtree(target)
        rows.append(_growth(settings, measured))
    results = Results(
        name="prepare",
        command=options.command,
        rows=tuple(rows),
        ratios=tuple(ratios),
        **asdict(describe(torch.device("cpu"))),
    )
    log.info("written to %s", write(results, options.output))
    return 0


@dataclass(frozen=True)
class Measured:
    """What a process took.

    Attributes:
        seconds: from start to end, interpreter included.
        bytes: most memory that was resident at once.
        output: what it printed.
    """

    seconds: float
    bytes: float
    output: str


def make_log(folder: Path, events: int) -> None:
    """Files of five million events, of which the first `events` are wanted; those that are there stay.

    Users and items have densities x^-0.8 and x^-1 over their ranks; a file is a day, in order of time.
    """
    files = folder / f"{events}"
    if files.exists():
        return
    building = folder / f"{events}.building"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    users, items = max(1, events // _EVENTS_PER_USER), max(1, events // _EVENTS_PER_ITEM)
    for number, first in enumerate(range(0, events, _EVENTS_PER_FILE)):
        rows = min(_EVENTS_PER_FILE, events - first)
        random = np.random.default_rng(number)
        columns = {
            "user_id": scattered(power_law(random.random(rows), 0.8, (1, users)) - 1, users),
            "item_id": scattered(power_law(random.random(rows), 1.0, (1, items)) - 1, items),
            "timestamp": 1_500_000_000 + number * 86_400 + np.sort(random.integers(0, 86_400, rows)),
            "action": random.integers(0, 5, rows).astype(np.int32),
        }
        pq.write_table(
            pa.table(columns), building / f"{number:04d}.parquet", compression="zstd", row_group_size=MILLION
        )
    building.rename(files)


def _prepare(setting: Setting, logs: Path, target: Path, threads: int) -> Measured:
    command = ["-m", "hstu_dist", "prepare", "data=events", f"data.input={logs / str(setting.events)}"]
    # made-up events repeat now and then
    command += [f"data.path={target}", "data.action_column=action", "data.duplicates=keep"]
    command += [f"memory_gib={setting.memory_gib}"]
    measured = _measure(command, threads)
    log.info("%s: %.1f s, %.2f GB", setting.case, measured.seconds, measured.bytes / 1e9)
    return measured


def _measure(arguments: list[str], threads: int) -> Measured:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=output)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _peak_bytes(process.pid))
            time.sleep(_POLL_SECONDS)
        seconds = time.perf_counter() - start
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(arguments)}: got exit status {process.returncode}, expected 0")
        output.seek(0)
        return Measured(seconds, float(peak), output.read())


def _peak_bytes(pid: int) -> int:
    """The highest resident memory of a process so far; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _of_preparation(setting: Setting, measured: Measured) -> tuple[list[Row], list[Ratio]]:
    rows = [
        Samples((measured.seconds,)).row(setting.case, "duckdb", "time", "s"),
        Samples((measured.bytes / 1e9,)).row(setting.case, "duckdb", "peak memory", "GB"),
    ]
    ratios = []
    for metric, limit, unit, got in (
        ("time", setting.seconds, "s", measured.seconds),
        ("peak memory", setting.bytes and setting.bytes / 1e9, "GB", measured.bytes / 1e9),
    ):
        if limit is not None:
            ratio = Ratio(
                case=setting.case, metric=metric, a=f"{limit:g} {unit}", b="duckdb", value=limit / got, target=1.0
            )
            ratios.append(ratio)
    return rows, ratios


def _read_back(setting: Setting, target: Path) -> tuple[list[Row], list[Ratio]]:
    """An epoch in a process of its own: rate, and all of its memory."""
    measured = _measure(["-m", "benchmarks.read_epoch", str(target)], 1)
    seconds, events = (float(word) for word in measured.output.split())
    case = f"{setting.events / MILLION:g} million events: {READ_BACK}"
    log.info("%s: %.1f million/s, %.2f GB", case, events / seconds / 1e6, measured.bytes / 1e9)
    rows = [
        Samples((events / seconds / 1e6,)).row(case, "hstu_dist", "events", "million/s"),
        Samples((measured.bytes / 1e9,)).row(case, "hstu_dist", "peak memory", "GB"),
    ]
    limits = f"{_READ_RATE / 1e6:g} million/s", f"{_READ_BYTES / 1e9:g} GB"
    return rows, [
        Ratio(
            case=case, metric="events/s", a="hstu_dist", b=limits[0], value=events / seconds / _READ_RATE, target=1.0
        ),
        Ratio(
            case=case, metric="peak memory", a=limits[1], b="hstu_dist", value=_READ_BYTES / measured.bytes, target=1.0
        ),
    ]


def _growth(settings: tuple[Setting, ...], measured: dict[Setting, Measured]) -> Row:
    """The exponent of time by events, at the smallest limit of memory, by least squares of logarithms."""
    limit = min(setting.memory_gib for setting in settings)
    sizes = [(s.events, measured[s].seconds) for s in settings if s.memory_gib == limit]
    x, y = (np.array([math.log(pair[place]) for pair in sizes]) for place in (0, 1))
    exponent = float(np.polyfit(x, y, 1)[0])
    events = sorted(events / MILLION for events, _ in sizes)
    case = f"{events[0]:g} to {events[-1]:g} million events, Zipf, memory_gib={limit:g}"
    return Samples((exponent,)).row(case, "duckdb", "growth of time", "exponent of events")
