"""README.md's table of measured figures, rendered from the committed result files."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.results import RESULTS, Results, load, ratios_table
from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically

README = ROOT / "README.md"
_BEGIN, _END = "<!-- results:begin -->\n", "<!-- results:end -->"

_TITLES = {
    "attention_cpu": "Attention on a CPU, fp32; a ratio above 1 means that the first contender is faster or smaller.",
    "kernels": "Triton kernels compiled ahead of time, without a GPU: what the compiler reports, not a speed.",
}
"""Result files shown, in this order, where they exist."""


def render(folder: Path = RESULTS) -> str:
    """Markdown of every shown result file that exists."""
    shown = [(title, load(name, folder)) for name, title in _TITLES.items() if (folder / f"{name}.json").exists()]
    if not shown:
        return "No result file is committed yet; `python -m benchmarks --help` lists what can be measured.\n"
    return "\n".join(f"{title}\n\n{ratios_table(results)}\n{_origin(results)}\n" for title, results in shown)


def embed(readme: str, tables: str) -> str:
    """README text with its tables replaced.

    Raises:
        UserError: the markers are missing.
    """
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UserError(
            f"{README.name}: got no markers {_BEGIN.strip()} and {_END}", "put them where the tables belong"
        )
    return f"{before}{begin}{tables}{end}{after}"


def run(options: argparse.Namespace) -> int:
    """Rewrites README.md."""
    write_atomically(README, embed(README.read_text(), render(RESULTS)).encode())
    return 0


def _origin(results: Results) -> str:
    device = f"{results.device}, {results.threads} threads"
    return f"Measured by `{results.command}` on {device}, {results.date[:10]}, commit {results.commit[:12]}."
