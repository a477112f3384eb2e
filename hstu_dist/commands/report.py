"""`report`: pages rendered from result files or run folders; nothing on them is typed by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from hstu_dist.errors import UserError

logger = logging.getLogger(__name__)


def report_results(root: Path, say: Callable[[str], None]) -> None:
    """Rewrites README.md's tables, docs/results.md and its plots.

    Args:
        root: of a checkout.
        say: prints a line for the user.

    Raises:
        UserError: `root` is no checkout, or a result file does not fit the schema.
    """
    # here and below: matplotlib takes half a second to import
    from hstu_dist.report.pages import Checkout, write_pages

    for path in write_pages(Checkout(root)):
        say(str(path))


def report_runs(runs: Sequence[Path], output: Path | None, say: Callable[[str], None]) -> None:
    """Writes the report of a run, or of several beside each other, and says where each stands.

    Args:
        runs: run folders, finished or not.
        output: the file; None: report.html in the folder of the run, or of several in the current folder.
        say: prints a line for the user.

    Raises:
        UserError: a folder holds no run, or the file cannot be written.
    """
    from hstu_dist.report.run_data import RunData
    from hstu_dist.report.run_page import REPORT_FILE, write_page
    from hstu_dist.report.run_sections import headline

    target = output or (runs[0] / REPORT_FILE if len(runs) == 1 else Path(REPORT_FILE))
    data = [RunData.read(path) for path in runs]
    try:
        write_page(data, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})", "give --output FILE") from error
    for run in data:
        say(f"{run.folder.path}: " + ", ".join(f"{name} {text}" for name, text in headline(run)))
    say(f"report: {target}")


def leave_report(run: Path, say: Callable[[str], None]) -> None:
    """Writes the report of a run that has just ended; a run that trained all the same does not fail for it."""
    try:
        report_runs([run], None, say)
    except Exception as error:
        logger.warning("no report: %s: %s", type(error).__name__, error)
