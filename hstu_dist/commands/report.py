"""`report`: pages rendered from the committed result files; nothing on them is typed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hstu_dist.errors import UserError


def report_results(root: Path, say: Callable[[str], None]) -> None:
    """Rewrites README.md's tables, docs/results.md and its plots.

    Args:
        root: of a checkout.
        say: prints a line for the user.

    Raises:
        UserError: `root` is no checkout, a result file does not fit the schema, or matplotlib is missing.
    """
    try:
        # of this package only the plots need it
        from hstu_dist.report.pages import Checkout, write_pages
    except ModuleNotFoundError as error:
        raise UserError(f"plots need {error.name}, which is not installed", "pip install 'hstu-dist[bench]'") from error
    for path in write_pages(Checkout(root)):
        say(str(path))
