"""README.md's digest and docs/results.md, rendered from the committed result files of a checkout."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically
from hstu_dist.report.plots import Curves, save_curves
from hstu_dist.report.results import Results, Row, load
from hstu_dist.report.tables import digest_table, ratios_table, rows_table
from hstu_dist.report.topics import TOPICS, Topic

_BEGIN, _END = "<!-- results:begin -->\n", "<!-- results:end -->"


@dataclass(frozen=True)
class Checkout:
    """The files of a repository that show figures.

    Attributes:
        root: its folder.
    """

    root: Path

    @property
    def results(self) -> Path:
        """Folder of the result files."""
        return self.root / "benchmarks" / "results"

    @property
    def readme(self) -> Path:
        """The page with the digest."""
        return self.root / "README.md"

    @property
    def page(self) -> Path:
        """The page with everything."""
        return self.root / "docs" / "results.md"

    def measured(self) -> dict[str, Results]:
        """Result files by name, without the cells in folders of their own; in the order they are shown.

        Raises:
            UserError: this is no checkout, or a file does not fit the schema.
        """
        if not self.results.is_dir():
            raise UserError(f"{self.results}: no such folder", "run the command at the root of a checkout")
        names = sorted(path.stem for path in self.results.glob("*.json"))
        order = [*(n for n in TOPICS if n in names), *(n for n in names if n not in TOPICS)]
        return {name: load(name, self.results) for name in order}

    def cells(self, name: str) -> list[Results]:
        """The files that a summary was made from."""
        return [load(f"{name}/{path.stem}", self.results) for path in sorted((self.results / name).glob("*.json"))]


def write_pages(checkout: Checkout) -> list[Path]:
    """Renders both pages and the plots.

    Returns:
        What was written.
    """
    # first, because it tells whether this is a checkout at all
    tables = summary(checkout)
    readme = embed(checkout.readme.read_text(), tables)
    write_atomically(checkout.readme, readme.encode())
    written = [checkout.readme, checkout.page]
    for name in checkout.measured():
        curves = learning_curves(checkout.cells(name))
        if curves:
            stem = checkout.page.parent / "figures" / f"{name}_learning_curves"
            written += save_curves(curves, f"{name}: a line per experiment and seed", stem)
    # after the plots, which it links to
    write_atomically(checkout.page, everything(checkout).encode())
    return written


def embed(page: str, tables: str) -> str:
    """README text with its tables replaced.

    Raises:
        UserError: the markers are missing.
    """
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UserError(f"README.md: got no markers {_BEGIN.strip()} and {_END}", "put them where the tables belong")
    return f"{before}{begin}{tables}{end}{after}"


def summary(checkout: Checkout) -> str:
    """Markdown for README.md: chosen rows, then a line per result file with what it missed."""
    measured = checkout.measured()
    if not measured:
        return "No result file is committed yet; `python -m benchmarks --help` lists what can be measured.\n"
    rows = [_rows_of(checkout, name, results) for name, results in measured.items() if _topic(name).metrics]
    lines = digest_table(
        [(_topic(name).title, _headlines(name, results), results) for name, results in measured.items()]
    )
    where = "Every figure, with command, commit and date: [docs/results.md](docs/results.md).\n"
    return "\n".join([*rows, lines, where])


def everything(checkout: Checkout) -> str:
    """Markdown of docs/results.md: all ratios and rows of all result files, and the plots that exist."""
    source = "[benchmarks/results](../benchmarks/results)"
    head = f"# Results\n\nRendered by `python -m hstu_dist report results` from {source}.\n"
    return "\n".join([head, *(_section(checkout, name, results) for name, results in checkout.measured().items())])


def learning_curves(cells: list[Results]) -> Curves:
    """Figures per epoch, metric → cell → [(epoch, value)]; empty without cells that have them."""
    curves: Curves = {}
    for cell in cells:
        for row in cell.rows:
            epoch = re.fullmatch(r"epoch (\d+)", row.case)
            if epoch:
                metric = f"{row.contender} {row.metric}"
                line = curves.setdefault(metric, {}).setdefault(cell.name.rpartition("/")[2], [])
                line.append((int(epoch[1]), row.value))
    return curves


def _rows_of(checkout: Checkout, name: str, results: Results) -> str:
    topic = _topic(name)
    chosen = tuple(row for row in results.rows if row.contender in (topic.contenders or {row.contender}))
    table = rows_table(replace(results, rows=chosen), topic.metrics)
    return f"**{topic.title}.** {topic.note}\n\n{table}\n{_origin(checkout, name, results)}\n"


def _headlines(name: str, results: Results) -> dict[str, float]:
    found = {(ratio.case, ratio.metric, ratio.a, ratio.b): ratio.value for ratio in results.ratios}
    return {text: found[key] for text, key in _topic(name).headlines.items() if key in found}


def _section(checkout: Checkout, name: str, results: Results) -> str:
    topic = _topic(name)
    parts = [f"## {topic.title}", topic.note, _origin(checkout, name, results)]
    if results.ratios:
        parts.append(ratios_table(results).rstrip())
    parts += [*_row_tables(results), *_plots(checkout, name)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _row_tables(results: Results) -> Iterator[str]:
    """One table per set of metrics, so that no column is mostly empty."""
    metrics_of: dict[tuple[str, str], list[str]] = {}
    for row in results.rows:
        metrics_of.setdefault(_who(row), []).append(row.metric)
    for metrics in dict.fromkeys(map(tuple, metrics_of.values())):
        rows = tuple(row for row in results.rows if tuple(metrics_of[_who(row)]) == metrics)
        yield rows_table(replace(results, rows=rows), metrics).rstrip()


def _who(row: Row) -> tuple[str, str]:
    return row.case, row.contender


def _plots(checkout: Checkout, name: str) -> Iterator[str]:
    for folder in (checkout.results, checkout.page.parent / "figures"):
        for path in sorted(folder.glob(f"{name}_*.svg")):
            yield f"![{path.stem.replace('_', ' ')}]({os.path.relpath(path, checkout.page.parent)})"


def _topic(name: str) -> Topic:
    return TOPICS.get(name, Topic(title=name.replace("_", " "), note=""))


def _origin(checkout: Checkout, name: str, results: Results) -> str:
    # a summary has the command of whoever made it last; the measurements are older, and each has its own
    cells = checkout.cells(name)
    what = (
        f"in {len(cells)} parts, each with its command in `benchmarks/results/{name}`,"
        if cells
        else f"by `{results.command}`"
    )
    measured = sorted(cells or [results], key=lambda one: one.date)
    devices = " and ".join(dict.fromkeys(map(_device, measured)))
    days = dict.fromkeys(one.date[:10] for one in (measured[0], measured[-1]))
    commits = list(dict.fromkeys(map(_commit, measured)))
    word = "commit" if len(commits) == 1 else "commits"
    return f"Measured {what} on {devices}, {' to '.join(days)}, {word} {', '.join(commits)}."


def _device(results: Results) -> str:
    return f"{results.device}, {results.threads} thread{'s' if results.threads > 1 else ''}"


def _commit(results: Results) -> str:
    commit, changed, _ = results.commit.partition("+")
    return f"{commit[:12]} with uncommitted changes" if changed else commit[:12]
