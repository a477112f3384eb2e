"""Runs that a Hydra sweeper asks for: finished ones are skipped, a failed one does not stop the others."""

from __future__ import annotations

import contextlib
import io
import math
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console
from rich.table import Table

from hstu_dist.commands.scale_cells import remember_cells, training_compute
from hstu_dist.config import RunConfig, compose, conf_dir, difference, explained_composition, load, prefixed
from hstu_dist.console import say
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.files import replacing
from hstu_dist.run_folder import RunFolder, manifest_of
from launch.local import stop_signals
from launch.run_files import read_job

_POLL_SECONDS = 0.2
_NAMING = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


@dataclass
class Cell:
    """One combination.

    Attributes:
        overrides: all of it, its own name included.
        swept: the settings that differ between the cells, key → value.
        base: name of the run without its settings.
        config: the run.
        process: its launch, once started.
        submitted: whether a scheduler had it already.
    """

    overrides: list[str]
    swept: dict[str, str]
    base: str
    config: RunConfig
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    submitted: bool = field(default=False, init=False)

    @property
    def folder(self) -> RunFolder:
        """Of its run."""
        return RunFolder(self.config.run_dir)

    @property
    def result(self) -> dict[str, Any] | None:
        """What the run wrote, if it has nothing left to train."""
        return self.folder.finished(self.config.trainer.last_epoch)

    @property
    def state(self) -> str:
        """A word for the table."""
        if self.result is not None:
            return "finished"
        if self.submitted:
            return "submitted"
        code = None if self.process is None else self.process.poll()
        if self.process is None or code is None:
            return "waiting" if self.process is None else "running"
        if code == ExitCode.FINISHED and read_job(self.folder) is not None:
            return "submitted"
        # the last: before it could hear the signal
        stopped = code == ExitCode.STOPPED or code > 128 or code == -signal.SIGTERM
        return "stopped" if stopped else f"failed ({code})"

    @property
    def objective(self) -> float:
        """Best validation value of the monitored metric; NaN where there is none."""
        validation = (self.result or {}).get("validation") or {}
        return float(validation.get(self.config.trainer.evaluation.monitor, math.nan))

    @property
    def printed(self) -> Path:
        """File with what its launch printed."""
        return self.config.run_dir.with_name(f"{self.config.name}.log")


def run(
    overrides: Sequence[str],
    jobs: int | None,
    preview: Callable[[RunConfig], str] | None,
    is_submitted: Callable[[RunConfig], bool],
) -> int:
    """Launches every cell that a sweeper asks for and that has not finished, shows a table, writes one Parquet file.

    Args:
        overrides: with several values for some keys, in Hydra's syntax, and those of Hydra's sweepers.
        jobs: launches at the same time; None: `hydra.launcher.jobs`.
        preview: instead of launching, print what this says of every cell.
        is_submitted: whether a scheduler has a run already.

    Returns:
        0: all cells finished or were handed to a scheduler; 1: some did not; 128 + signal: stopped by it.

    Raises:
        UserError: a cell's settings are refused, or two would share a folder; no cell of its batch has started.
    """
    sweep = Sweep(fixed_settings(overrides), preview, is_submitted)
    with contextlib.suppress(_StoppedError):
        hand_to_sweeper(overrides, jobs, sweep)
    if preview is not None:
        return ExitCode.FINISHED
    say(table(sweep.cells))
    say(f"results: {write_results(sweep.cells)}")
    for cell in sweep.cells:
        if cell.state.startswith("failed"):
            say(f"{cell.config.name} failed, see {cell.printed}; alone: python -m launch {shlex.join(cell.overrides)}")
    if sweep.signal is not None:
        return 128 + sweep.signal
    return ExitCode.FINISHED if all(c.state in ("finished", "submitted") for c in sweep.cells) else ExitCode.FAILED


def fixed_settings(overrides: Sequence[str]) -> set[str]:
    """Keys to which the command line gives one value; of a key that is given twice the last counts.

    Raises:
        UserError: not Hydra's syntax, or another launcher.
    """
    fixed: dict[str, bool] = {}
    with explained_composition(conf_dir()):
        for override in OverridesParser.create().parse_overrides(overrides=prefixed(overrides)):
            key = override.get_key_element()
            if key == "hydra/launcher":
                raise UserError(f"{override.input_line}: got a launcher", "choose where the runs start with cluster=")
            fixed[key] = not override.is_sweep_override()
    return {key for key, alone in fixed.items() if alone}


def hand_to_sweeper(overrides: Sequence[str], jobs: int | None, sweep: Sweep) -> None:
    """Lets Hydra's sweeper choose cells; its launcher, hydra_plugins/hstu_dist_launcher.py, gives them to `sweep`."""
    words = [
        *prefixed(overrides),
        "hydra/launcher=hstu_dist",
        *([] if jobs is None else [f"hydra.launcher.jobs={jobs}"]),
    ]
    with explained_composition(conf_dir()), tempfile.TemporaryDirectory(prefix="hstu_dist-") as nowhere:
        if sweep.preview is not None:
            # sweepers leave a record of themselves
            words.append(f"hydra.sweep.dir='{nowhere}'")
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
        # only after it has been left can cells be composed
        assert hydra is not None
        hydra.multirun("train", task_function=sweep, overrides=words, with_log_configuration=False)


class _StoppedError(Exception):
    """A signal has ended the cells; the sweeper shall ask for no more."""


class Sweep:
    """What has become of the cells that a sweeper has asked for.

    Attributes:
        cells: in the order in which they were asked for.
        preview, is_submitted: as `run` takes them.
        signal: that has stopped them; None: none has.
    """

    def __init__(
        self,
        fixed: Collection[str],
        preview: Callable[[RunConfig], str] | None,
        is_submitted: Callable[[RunConfig], bool] = lambda config: False,
    ) -> None:
        """Keys that are `fixed` are the same in all cells."""
        self.cells: list[Cell] = []
        self.preview = preview
        self.is_submitted = is_submitted
        self.signal: int | None = None
        self._fixed = fixed

    def launch(self, batch: Sequence[Sequence[str]], jobs: int) -> list[float]:
        """Launches a batch of cells, so many at a time.

        Returns:
            The best monitored validation metric of each, which sweepers that search go by; NaN where there is none.

        Raises:
            UserError: a cell's settings are refused, or two would share a folder.
        """
        if jobs < 1:
            raise UserError(f"--jobs: got {jobs}, expected at least 1", "give the number of runs at the same time")
        cells = self.plan(batch)
        say(predicted_cost(cells))
        if self.preview is not None:
            for cell in cells:
                say(f"# {cell.config.name}\n{self.preview(cell.config)}")
            return [math.nan] * len(cells)
        for cell in cells:
            _check_starts(cell.config)
            cell.submitted = cell.result is None and self.is_submitted(cell.config)
        for folder in {Path(cell.config.output) for cell in cells}:
            here = [cell for cell in cells if Path(cell.config.output) == folder]
            remember_cells(folder, {cell.config.name: cell.overrides for cell in here})
        self.signal = _work_off(cells, jobs)
        if self.signal is not None:
            raise _StoppedError
        return [cell.objective for cell in cells]

    def plan(self, batch: Sequence[Sequence[str]]) -> list[Cell]:
        """Cells of a batch, checked; each has a run folder named after its settings."""
        cells = []
        for words in batch:
            cell = self._cell(words)
            known = next((other for other in self.cells if other.config.name == cell.config.name), cell)
            if known.overrides != cell.overrides:
                raise UserError(
                    f"two cells are both named {cell.config.name}",
                    "give settings whose values differ in letters or digits",
                )
            _check_unchanged(cell)
            if known is cell:
                self.cells.append(cell)
            # a sweeper that searches may come back to a point
            cells.append(known)
        return cells

    def _cell(self, words: Sequence[str]) -> Cell:
        values = {key: value for key, _, value in (word.partition("=") for word in words)}
        swept = {key: value for key, value in values.items() if key not in self._fixed}
        # an experiment or a name tells runs apart by itself
        base = compose(words).name
        name = base + _suffix({k: v for k, v in swept.items() if k not in ("name", "experiment")})
        named = [*(word for word in words if not word.startswith("name=")), f"name={name}"]
        return Cell(named, swept, base, compose(named))


def _check_unchanged(cell: Cell) -> None:
    """Whether a finished run of the cell's name is what the cell asks for.

    Raises:
        UserError: it was made with other settings or from other data.
    """
    file = cell.folder.config_file
    changed = difference(load(file), cell.config) if cell.result is not None and file.exists() else []
    if changed:
        raise UserError(
            f"{cell.config.name}: has finished with other settings ({'; '.join(changed[:3])})",
            "set output=FOLDER for a new sweep, or remove its folder",
        )
    if cell.result is not None:
        cell.folder.check_data(cell.config, manifest_of(cell.config))


def _check_starts(config: RunConfig) -> None:
    """Whether a launch starts a run, or leaves that to a scheduler.

    Raises:
        UserError: it would print lines to start by hand.
    """
    if config.cluster.kind == "hosts" and config.cluster.start == "print":
        raise UserError(
            "cluster.start: got print with --multirun, whose cells somebody would have to start by hand",
            "set cluster.start=ssh, or give dry_run=true to see the lines",
        )


def predicted_cost(cells: Sequence[Cell]) -> str:
    """Training FLOPs of the cells that have not finished, from their settings, before any of them starts."""
    waiting = [cell for cell in cells if cell.result is None]
    unknown, total, lines = 0, 0, []
    for cell in waiting:
        try:
            compute = training_compute(cell.config)
        except UserError:
            # its own launch says what is wrong
            compute = None
        unknown += compute is None
        total += compute or 0
        lines.append(f"  {cell.config.name}: {'not known' if compute is None else f'{compute:.3g}'}")
    more = f", and {unknown} cells that cannot be told before" if unknown else ""
    done = len(cells) - len(waiting)
    return "\n".join([f"{total:.3g} training FLOPs in {len(waiting)} cells{more}; {done} are done", *lines])


def _suffix(swept: Mapping[str, str]) -> str:
    """`_width-64_seed-1`; whole keys where their last parts are the same."""
    short = [key.rpartition(".")[2] for key in swept]
    keys = short if len(set(short)) == len(short) else list(swept)
    text = "".join(f"_{key}-{value}" for key, value in zip(keys, swept.values(), strict=True))
    return "".join(letter if letter in _NAMING else "-" for letter in text)


def _work_off(cells: Sequence[Cell], jobs: int) -> int | None:
    """Launches the cells in order, so many at a time; the signal that stopped it, if one did."""
    with stop_signals() as received:
        # a sweeper may ask for one twice
        for cell in {cell.config.name: cell for cell in cells}.values():
            if cell.result is not None or cell.submitted:
                continue
            while not received and sum(c.state == "running" for c in cells) >= jobs:
                time.sleep(_POLL_SECONDS)
            if received:
                break
            say(f"{cell.config.name}: started, see {cell.printed}")
            _start(cell)
        running = [cell.process for cell in cells if cell.process is not None]
        stopped = False
        while any(process.poll() is None for process in running):
            if received and not stopped:
                stopped = True
                for process in running:
                    process.terminate()
            time.sleep(_POLL_SECONDS)
    return received[0] if received else None


def _start(cell: Cell) -> None:
    cell.printed.parent.mkdir(parents=True, exist_ok=True)
    with cell.printed.open("wb") as printed:
        cell.process = subprocess.Popen(
            [sys.executable, "-m", "launch", *cell.overrides],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches the cells through us only
            start_new_session=True,
        )


def table(cells: Sequence[Cell]) -> str:
    """One row a cell: its settings, state and monitored test metric."""
    keys = list(cells[0].swept)
    metric = cells[0].config.trainer.evaluation.monitor
    shown = Table()
    for column in ("run", *keys, "state", f"test {metric}"):
        # names of runs are for copying
        shown.add_column(column, overflow="fold", no_wrap=column == "run")
    for cell in cells:
        result = cell.result
        value = f"{result['test'][metric]:.4f}" if result and metric in result["test"] else ""
        shown.add_row(cell.config.name, *(cell.swept[key] for key in keys), cell.state, value)
    text = io.StringIO()
    Console(file=text, width=160).print(shown)
    return text.getvalue().rstrip()


def write_results(cells: Sequence[Cell]) -> Path:
    """One row a cell: run, state, the swept settings, epochs and every test metric; null where there is none yet."""
    rows = []
    for cell in cells:
        result = cell.result or {}
        row: dict[str, Any] = {"run": cell.config.name, "state": cell.state, **cell.swept}
        row |= {name: result.get(name) for name in ("epochs", "best_epoch")}
        row |= {f"test/{metric}": value for metric, value in result.get("test", {}).items()}
        rows.append(row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    # the same file for the same command
    keys = "-".join(key.rpartition(".")[2] for key in cells[0].swept)
    path = Path(cells[0].config.output) / f"{cells[0].base}_by_{keys}.parquet"
    with replacing(path) as file:
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), file)
    return path
