"""MovieLens-1M: every experiment at every seed, an epoch chosen on validation, then a refit of as many epochs.

A cell is one experiment at one seed. Its runs resume and are skipped like any other run; what it found is a small
file of its own, so that a lost run folder loses nothing, and the summary is made from these files alone.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.ml1m_cells import Cell, Run, is_current, write_cell, write_summary
from benchmarks.options import positive
from hstu_dist.config import compose
from hstu_dist.data.config import EventsConfig
from hstu_dist.data.prepare import prepare
from hstu_dist.errors import ExitCode, UserError
from launch.__main__ import main as launch

EXPERIMENTS = ("sasrec", "hstu", "hstu_large", "best")
"""Each is conf/experiment/ml1m_NAME.yaml."""

_TINY = (
    "data=events",
    "data.max_length=16",
    "model.width=8",
    "trainer.epochs=3",
    "trainer.global_batch_size=8",
    "trainer.logging.every_steps=2",
    "trainer.logging.tensorboard=false",
    "trainer.device=cpu",
)
"""What makes an experiment a matter of seconds."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all cells share.

    Attributes:
        settings: overrides of every run, such as the number of ranks.
        runs: folder of run folders.
        output: folder of result files.
        command: what to type to repeat the study.
    """

    settings: tuple[str, ...]
    runs: Path
    output: Path
    command: str

    def overrides(self, cell: Cell, *more: str) -> list[str]:
        """Settings of a cell's first run, or with `more` of its refit."""
        suffix = "_refit" if more else ""
        return [
            f"experiment=ml1m_{cell.experiment}",
            f"seed={cell.seed}",
            f"output={self.runs}",
            f"name={cell.experiment}_seed{cell.seed}{suffix}",
            *self.settings,
            *more,
        ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    names = ", ".join(EXPERIMENTS)
    parser.add_argument(
        "--experiments",
        nargs="+",
        choices=EXPERIMENTS,
        default=list(EXPERIMENTS),
        metavar="NAME",
        help=f"which of {names} (default: all)",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=positive, default=[1, 2, 3], metavar="SEED", help="seeds of each (default: 1 2 3)"
    )
    parser.add_argument("--nproc", type=positive, default=2, help="ranks of a run (default: %(default)s)")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/ml1m, with --quick beside output)")


def run(options: argparse.Namespace) -> int:
    """Runs the cells that are missing, seed by seed, then writes the summary of all that exist."""
    study = _study(options)
    failed: list[str] = []
    # the first seed of everything first: the summary is useful as soon as possible
    for seed in options.seeds:
        for experiment in options.experiments:
            cell = Cell(experiment, seed)
            code = _run_cell(study, cell)
            if code >= 128:
                # a signal stopped it: whoever sent it wants no further cell
                return code
            if code != ExitCode.FINISHED:
                failed.append(cell.name)
            else:
                write_summary(EXPERIMENTS, study.output, study.command, lambda c: compose(study.overrides(c)))
    if failed:
        raise UserError(f"not finished: {', '.join(failed)}", "see the errors above; the same command goes on")
    return 0


def _study(options: argparse.Namespace) -> Study:
    runs = options.runs or (options.output / "ml1m_runs" if options.quick else Path("runs") / "ml1m")
    settings = [f"nproc={options.nproc}", f"trainer.device={options.device.type}"]
    if options.threads is not None:
        settings.append(f"trainer.threads={options.threads}")
    if options.quick:
        settings += [*_TINY, f"data.path={_tiny_data(options.output)}"]
    return Study(settings=tuple(settings), runs=runs, output=options.output, command=options.command)


def _run_cell(study: Study, cell: Cell) -> int:
    """Exit code of the launch that did not finish, or FINISHED."""
    config = compose(study.overrides(cell))
    if is_current(cell, study.output, config):
        log.info("%s: already measured", cell.name)
        return ExitCode.FINISHED
    log.info("%s: choosing the epoch on the validation split", cell.name)
    code = launch(study.overrides(cell))
    if code != ExitCode.FINISHED:
        return code
    chosen = Run.read(config)
    again = study.overrides(
        cell, "trainer.train_on=train_validation", f"trainer.stop_epoch={chosen.result['best_epoch']}"
    )
    log.info("%s: refit of %d epochs on the training and validation events", cell.name, chosen.result["best_epoch"])
    code = launch(again)
    if code == ExitCode.FINISHED:
        write_cell(cell, (chosen, Run.read(compose(again))), study.output, study.command)
    return code


def _tiny_data(folder: Path) -> Path:
    """40 users who walk through 30 items with a stride of their own; prepared once."""
    target = folder / "ml1m_data"
    random = np.random.default_rng(7)
    lines = ["user_id,item_id,timestamp"]
    for user in range(40):
        first = int(random.integers(30))
        lines += [f"{user},{(first + step * (1 + user % 3)) % 30},{10**9 + 100 * step}" for step in range(12)]
    folder.mkdir(parents=True, exist_ok=True)
    events = folder / "ml1m_events.csv"
    events.write_text("\n".join(lines) + "\n")
    prepare(EventsConfig(input=str(events), path=str(target), max_length=16))
    return target
