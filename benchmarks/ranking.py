"""Ranking on MovieLens-1M: HSTU against DLRM at several seeds, and HSTU with one choice changed at a time.

A cell is one contender at one seed: a run whose epoch is chosen on the validation events and whose test events are
read once. Its runs resume and are skipped like any other run; what it found is a small file of its own, and the
summary is made from these files alone.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass

import numpy as np

from benchmarks import study
from benchmarks.ranking_cells import Cell, is_current, write_cell, write_summary
from benchmarks.study import StudyOptions, TinyStudy
from benchmarks.study_cells import Run
from hstu_dist.config import compose
from hstu_dist.errors import ExitCode
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
"""HSTU with one choice changed, at one seed."""

_ABLATION_SEED = 1
_PARTS = ("hstu", "baselines", "ablations")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Study(StudyOptions):
    """What all cells share."""

    def overrides(self, cell: Cell) -> list[str]:
        """Settings of a cell's run."""
        changes = MAIN.get(cell.contender) or (*MAIN["hstu"], *ABLATIONS[cell.contender])
        own = [f"seed={cell.seed}", f"output={self.runs}", f"name={cell.stem}"]
        # the group first: its keys are set after it
        return [changes[0], *self.settings, *changes[1:], *own]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    study.add_options(parser, "ranking")
    parser.add_argument(
        "--parts", nargs="+", choices=_PARTS, default=list(_PARTS), help="which cells to run; the summary has all"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the cells that are missing, then writes the summary of all that exist."""
    tiny = study.tiny_settings("ranking", options.output, _tiny()) if options.quick else []
    shared = Study.of("ranking", options, tiny)
    cells = {
        "hstu": [Cell("hstu", seed) for seed in options.seeds],
        "baselines": [Cell(contender, seed) for seed in options.seeds for contender in MAIN if contender != "hstu"],
        "ablations": [Cell(contender, _ABLATION_SEED) for contender in ABLATIONS],
    }
    return study.run_cells(
        [cell for part in options.parts for cell in cells[part]],
        lambda cell: _run_cell(shared, cell),
        lambda: write_summary(
            [*MAIN, *ABLATIONS], shared.output, shared.command, lambda c: compose(shared.overrides(c))
        ),
    )


def _run_cell(shared: Study, cell: Cell) -> int:
    """Exit code of the launch that did not finish, or FINISHED."""
    config = compose(shared.overrides(cell))
    if is_current(cell, shared.output, config):
        log.info("%s: already measured", cell.name)
        return ExitCode.FINISHED
    log.info("%s", cell.name)
    code = launch(shared.overrides(cell))
    if code == ExitCode.FINISHED:
        write_cell(cell, Run.read(config), shared.output, shared.command)
    return code


def _tiny() -> TinyStudy:
    """40 users who rate 12 of 30 items each, and like every second or every third."""
    random = np.random.default_rng(7)
    lines = ["user_id,item_id,timestamp,rating"]
    for user in range(40):
        for step in range(12):
            item = int(random.integers(30))
            liked = (item % (2 + user % 2) == 0) ^ (random.random() < 0.1)
            lines.append(f"{user},{item},{10**9 + 1000 * user + 20_000 * step},{5 if liked else 1 + step % 3}")
    return TinyStudy(epochs=2, max_length=12, events=lines, action_column="rating")
