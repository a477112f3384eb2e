"""Studies: cells, a run or two each, that are measured once and skipped from then on."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeVar

from benchmarks.options import positive
from hstu_dist.data.config import EventsConfig
from hstu_dist.data.prepare import prepare
from hstu_dist.errors import ExitCode, UserError

_TINY = (
    "data=events",
    "model.width=8",
    "trainer.global_batch_size=8",
    "trainer.logging.every_steps=2",
    "trainer.logging.tensorboard=false",
    "trainer.device=cpu",
)
"""What makes a run a matter of seconds."""

log = logging.getLogger(__name__)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


AnyCell = TypeVar("AnyCell", bound=_Named)


@dataclass(frozen=True, kw_only=True)
class TinyStudy:
    """A study of seconds.

    Attributes:
        epochs: of a run.
        max_length: of the model's histories.
        events: lines of its event log, a CSV file with a header.
        action_column: of the log, if it has one.
    """

    epochs: int
    max_length: int
    events: Sequence[str]
    action_column: str | None = None


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
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

    @classmethod
    def of(cls, name: str, options: argparse.Namespace, own: Sequence[str]) -> Self:
        """As the command line says; `own`: settings of the study itself."""
        runs = options.runs or (options.output / f"{name}_runs" if options.quick else Path("runs") / name)
        settings = [f"nproc={options.nproc}", f"trainer.device={options.device.type}"]
        if options.threads is not None:
            settings.append(f"trainer.threads={options.threads}")
        return cls(settings=(*settings, *own), runs=runs, output=options.output, command=options.command)


def add_options(parser: argparse.ArgumentParser, name: str, nproc: int = 2) -> None:
    """Options of every study, which has `nproc` ranks unless told otherwise."""
    parser.add_argument(
        "--seeds", nargs="+", type=positive, default=[1, 2, 3], metavar="SEED", help="seeds (default: 1 2 3)"
    )
    parser.add_argument("--nproc", type=positive, default=nproc, help="ranks of a run (default: %(default)s)")
    parser.add_argument(
        "--runs", type=Path, help=f"folder of the runs (default: runs/{name}, with --quick beside output)"
    )


def run_cells(cells: Iterable[AnyCell], measure: Callable[[AnyCell], int], summarise: Callable[[], object]) -> int:
    """Measures cells one after the other, and summarises those that exist after each.

    Args:
        cells: in order.
        measure: gives the exit code of what did not finish, or FINISHED.
        summarise: writes the summary.

    Returns:
        The exit code.

    Raises:
        UserError: some did not finish; the others did.
    """
    failed: list[str] = []
    for cell in cells:
        code = measure(cell)
        if code >= 128:
            # a signal stopped it: whoever sent it wants no further cell
            return code
        if code != ExitCode.FINISHED:
            failed.append(cell.name)
        else:
            summarise()
    if failed:
        raise UserError(f"not finished: {', '.join(failed)}", "see the errors above; the same command goes on")
    return 0


def tiny_settings(name: str, output: Path, tiny: TinyStudy) -> list[str]:
    """Prepares the data set of a study of seconds and gives the settings of its runs."""
    target = output / f"{name}_data"
    output.mkdir(parents=True, exist_ok=True)
    events = output / f"{name}_events.csv"
    events.write_text("\n".join(tiny.events) + "\n")
    config = EventsConfig(
        input=str(events), path=str(target), max_length=tiny.max_length, action_column=tiny.action_column
    )
    prepare(config)
    own = [f"data.max_length={tiny.max_length}", f"trainer.epochs={tiny.epochs}", f"data.path={target}"]
    return [*_TINY, *own]
