"""Ranking on MovieLens-1M: HSTU against DLRM at several seeds, and HSTU with one choice changed at a time.

A cell is one contender at one seed: a run whose epoch is chosen on the validation events and whose test events are
read once. Its runs resume and are skipped like any other run; what it found is a small file of its own, and the
summary is made from these files alone.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.ml1m_cells import Run
from benchmarks.options import positive
from benchmarks.ranking_cells import Cell, is_current, write_cell, write_summary
from hstu_dist.config import compose
from hstu_dist.data.config import EventsConfig
from hstu_dist.data.prepare import prepare
from hstu_dist.errors import ExitCode, UserError
from launch.__main__ import main as launch

MAIN: dict[str, tuple[str, ...]] = {
    "hstu": ("experiment=ml1m_ranking_hstu",),
    "dlrm": ("experiment=ml1m_ranking_dlrm",),
    "dlrm_cross": ("experiment=ml1m_ranking_dlrm", "model.interaction=cross"),
}
"""Contenders at every seed."""

ABLATIONS: dict[str, tuple[str, ...]] = {
    "time at the input": ("model.input_time=true",),
    "semi-local, 64 and 9": ("model.window=64", "model.global_prefix=9"),
    "last layer truncated to 64": ("model.truncated_layers=1", "model.truncated_length=64"),
    "no time bias": ("model.relative_bias=position",),
    "no user token": ("task.contextual=[]",),
    "production layer": ("model.affine_norm=true", "model.uvqk_bias=true", "model.concat_ux=true"),
    "one head": ("loss.heads=[{name: like, kind: binary, threshold: 4}]",),
}
"""HSTU with one choice changed, at the first seed."""

_PARTS = ("hstu", "baselines", "ablations")

_TINY = (
    "data=events",
    "data.max_length=12",
    "model.width=8",
    "trainer.epochs=2",
    "trainer.global_batch_size=8",
    "trainer.logging.every_steps=2",
    "trainer.logging.tensorboard=false",
    "trainer.device=cpu",
)
"""What makes a cell a matter of seconds."""

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

    def overrides(self, cell: Cell) -> list[str]:
        """Settings of a cell's run."""
        changes = MAIN.get(cell.contender) or (*MAIN["hstu"], *ABLATIONS[cell.contender])
        own = [f"seed={cell.seed}", f"output={self.runs}", f"name={cell.stem}"]
        # the group first: its keys are set after it
        return [changes[0], *self.settings, *changes[1:], *own]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument(
        "--seeds", nargs="+", type=positive, default=[1, 2, 3], metavar="SEED", help="seeds (default: 1 2 3)"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=_PARTS, default=list(_PARTS), help="which cells to run; the summary has all"
    )
    parser.add_argument("--nproc", type=positive, default=2, help="ranks of a run (default: %(default)s)")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/ranking; --quick: beside output)")


def run(options: argparse.Namespace) -> int:
    """Runs the cells that are missing, then writes the summary of all that exist."""
    study = _study(options)
    cells = {
        "hstu": [Cell("hstu", seed) for seed in options.seeds],
        "baselines": [Cell(contender, seed) for seed in options.seeds for contender in MAIN if contender != "hstu"],
        "ablations": [Cell(contender, options.seeds[0]) for contender in ABLATIONS],
    }
    every_cell = [cell for part in _PARTS for cell in cells[part]]
    failed: list[str] = []
    for cell in (cell for part in options.parts for cell in cells[part]):
        code = _run_cell(study, cell)
        if code >= 128:
            # a signal stopped it: whoever sent it wants no further cell
            return code
        if code != ExitCode.FINISHED:
            failed.append(cell.name)
        else:
            write_summary(every_cell, study.output, study.command, lambda c: compose(study.overrides(c)))
    if failed:
        raise UserError(f"not finished: {', '.join(failed)}", "see the errors above; the same command goes on")
    return 0


def _study(options: argparse.Namespace) -> Study:
    runs = options.runs or (options.output / "ranking_runs" if options.quick else Path("runs") / "ranking")
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
    log.info("%s", cell.name)
    code = launch(study.overrides(cell))
    if code == ExitCode.FINISHED:
        write_cell(cell, Run.read(config), study.output, study.command)
    return code


def _tiny_data(folder: Path) -> Path:
    """40 users who rate 12 of 30 items each, and like every second or every third; prepared once."""
    target = folder / "ranking_data"
    random = np.random.default_rng(7)
    lines = ["user_id,item_id,timestamp,rating"]
    for user in range(40):
        for step in range(12):
            item = int(random.integers(30))
            liked = (item % (2 + user % 2) == 0) ^ (random.random() < 0.1)
            lines.append(f"{user},{item},{10**9 + 1000 * user + 20_000 * step},{5 if liked else 1 + step % 3}")
    folder.mkdir(parents=True, exist_ok=True)
    events = folder / "ranking_events.csv"
    events.write_text("\n".join(lines) + "\n")
    log_config = EventsConfig(input=str(events), path=str(target), max_length=12, action_column="rating")
    prepare(log_config)
    return target
