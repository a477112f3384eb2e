"""Run reports: one page of HTML that needs nothing else, for a run or for several beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from hstu_dist.files import write_atomically
from hstu_dist.report.run_data import RunData
from hstu_dist.report.run_sections import headline, sections

REPORT_FILE = "report.html"


def page(runs: Sequence[RunData]) -> str:
    """The page, at least one run."""
    # escapes everything but what is marked as safe: names and messages come from outside
    templates = Environment(
        loader=PackageLoader("hstu_dist", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    title = " · ".join(run.config.name for run in runs)
    heads = [(str(run.folder.path), headline(run)) for run in runs]
    return templates.get_template("run_page.html").render(title=title, heads=heads, sections=sections(runs))


def write_page(runs: Sequence[RunData], target: Path) -> None:
    """Writes the page of at least one run into a file."""
    write_atomically(target, page(runs).encode())
