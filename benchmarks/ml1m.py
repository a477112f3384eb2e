"""MovieLens-1M: every experiment at every seed, an epoch chosen on validation, then a refit of as many epochs.

A cell is one experiment at one seed. Its runs resume and are skipped like any other run; what it found is a small
file of its own, so that a lost run folder loses nothing, and the summary is made from these files alone.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass

import numpy as np

from benchmarks import study
from benchmarks.ml1m_cells import Cell, is_current, write_cell, write_summary
from benchmarks.study import StudyOptions, TinyStudy
from benchmarks.study_cells import Run
from hstu_dist.config import compose
from hstu_dist.errors import ExitCode
from launch.__main__ import main as launch

EXPERIMENTS = ("sasrec", "hstu", "hstu_no_bias", "hstu_large", "best")
"""Each is conf/experiment/ml1m_NAME.yaml."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Study(StudyOptions):
    """What all cells share."""

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
    study.add_options(parser, "ml1m")


def run(options: argparse.Namespace) -> int:
    """Runs the cells that are missing, seed by seed, then writes the summary of all that exist."""
    tiny = study.tiny_settings("ml1m", options.output, _tiny()) if options.quick else []
    shared = Study.of("ml1m", options, tiny)
    return study.run_cells(
        # the first seed of everything first: the summary is useful as soon as possible
        [Cell(experiment, seed) for seed in options.seeds for experiment in options.experiments],
        lambda cell: _run_cell(shared, cell),
        lambda: write_summary(EXPERIMENTS, shared.output, shared.command, lambda c: compose(shared.overrides(c))),
    )


def _run_cell(shared: Study, cell: Cell) -> int:
    """Exit code of the launch that did not finish, or FINISHED."""
    config = compose(shared.overrides(cell))
    if is_current(cell, shared.output, config):
        log.info("%s: already measured", cell.name)
        return ExitCode.FINISHED
    log.info("%s: choosing the epoch on the validation split", cell.name)
    code = launch(shared.overrides(cell))
    if code != ExitCode.FINISHED:
        return code
    chosen = Run.read(config)
    again = shared.overrides(
        cell, "trainer.train_on=train_validation", f"trainer.stop_epoch={chosen.result['best_epoch']}"
    )
    log.info("%s: refit of %d epochs on the training and validation events", cell.name, chosen.result["best_epoch"])
    code = launch(again)
    if code == ExitCode.FINISHED:
        write_cell(cell, (chosen, Run.read(compose(again))), shared.output, shared.command)
    return code


def _tiny() -> TinyStudy:
    """40 users who walk through 30 items with a stride of their own."""
    random = np.random.default_rng(7)
    lines = ["user_id,item_id,timestamp"]
    for user in range(40):
        first = int(random.integers(30))
        lines += [f"{user},{(first + step * (1 + user % 3)) % 30},{10**9 + 100 * step}" for step in range(12)]
    return TinyStudy(epochs=3, max_length=16, events=lines)
