"""README.md's digest and docs/results.md, rendered from the committed result files of a checkout."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically
from hstu_dist.report.plots import Curves, save_curves
from hstu_dist.report.results import Results, Row, load
from hstu_dist.report.tables import digest_table, ratios_table, rows_table

_BEGIN, _END = "<!-- results:begin -->\n", "<!-- results:end -->"


@dataclass(frozen=True, kw_only=True)
class Topic:
    """How a result file is shown.

    Attributes:
        title: heading.
        note: what a reader must know to read its figures.
        metrics: columns of a table of rows in README.md; none: its line in the digest alone.
        headlines: what the digest quotes, `text → (case, metric, a, b)` of a ratio.
    """

    title: str
    note: str = ""
    metrics: tuple[str, ...] = ()
    headlines: Mapping[str, tuple[str, str, str, str]] = field(default_factory=dict)


TOPICS: Mapping[str, Topic] = {
    "ml1m": Topic(
        title="MovieLens-1M",
        note="Means over the seeds (quartiles in brackets), ranked against all items but the history that the model "
        "sees. "
        "*validation-chosen* holds out a validation event, picks the best epoch by it and reads the test split once; "
        "*refit* then trains that many epochs on the validation events too. Published figures are of the reference "
        "protocol: trained on all but the test event, the best of all readings of the test split.",
        metrics=("hr@10", "ndcg@10", "hr@50", "hr@200"),
    ),
    "ranking": Topic(
        title="Ranking on MovieLens-1M",
        note="What a user does with a film that is shown (liked: 4 stars and more), split by time; the epoch is chosen "
        "on validation events, test events are read once. Means over the seeds (quartiles in brackets) of HSTU and "
        "DLRM, one seed of HSTU with one choice changed. Above 1 in a ratio means that HSTU is better; NE inverted.",
        metrics=("like/ne", "like/auc", "like/gauc", "stars/mse", "training TFLOP an epoch", "dense parameters"),
    ),
    "appendix_c": Topic(
        title="The paper's synthetic stream",
        note="Appendix C, Table 2: one pass in order over the first 90% of the stream, every event of held-out records "
        "of the last 10% predicted among all items. Means over the seeds (quartiles in brackets). Above 1 in a ratio "
        "means that the paper's order holds. Published figures are of the whole stream and models of unknown size.",
        metrics=("hr@10", "hr@50", "loss", "training TFLOP", "dense parameters"),
    ),
    "attention_cpu": Topic(
        title="Attention on a CPU",
        note="fp32; a ratio above 1 means that the first contender is faster or smaller.",
        headlines={
            "training on 8,192 tokens, native over PyTorch's flash attention:": (
                "B2 H4 N8192 d64",
                "forward+backward rate",
                "native",
                "sdpa_padded",
            ),
            "ML-1M with relative bias, native over padded PyTorch:": (
                "B128 H1 lengths of ML-1M d50, position and time bias",
                "forward+backward rate",
                "native",
                "padded_eager",
            ),
        },
    ),
    "train_step": Topic(
        title="A training step of MovieLens-1M",
        note="Batch 128, fp32, time and memory against their limits, and the parts of the step.",
        headlines={
            "HSTU-large, 2 ranks, limit of 0.35 s over time:": ("HSTU-large, 2 x 1 threads", "step", "0.35 s", "step")
        },
    ),
    "encoder_cpu": Topic(
        title="Encoder against flash attention, on a CPU",
        note="Original sequences per second of HSTU layers over pre-norm Transformer layers of the same width and "
        "depth (D 512, 8 heads), fp32; torch's flash attention stands in for FlashAttention2, which has no "
        "CPU kernels. Full: every sequence has N tokens; ragged: a quarter of that in mean; SL: Stochastic "
        "Length keeps whole or cuts as its law says. A padded Transformer spends the same on each. "
        "Activations: of a Transformer layer over those of an HSTU layer.",
        headlines={
            "8,192 tokens, training: Stochastic Length 1.6 over a padded Transformer:": (
                "N 8192, training",
                "sequences/s",
                "HSTU, SL 1.6",
                "Transformer SDPA flash, padded",
            ),
            "ragged sequences over it:": (
                "N 8192, training",
                "sequences/s",
                "HSTU, ragged",
                "Transformer SDPA flash, padded",
            ),
        },
    ),
    "embedding": Topic(
        title="Embedding tables",
        note="One lookup with its backward and update, against `nn.Embedding` with a sparse gradient and the same "
        "optimizer by hand; above 1 means faster, or less memory than the limit. One rank exchanges nothing.",
        headlines={
            "90 million rows of 32 in fp16, limit of 1.3 x their state over peak memory:": (
                "90,000,000 rows x 32, 2 ranks",
                "peak memory",
                "1.3 x weights and state",
                "fp16",
            )
        },
    ),
    "data": Topic(
        title="Data",
        note="One process; a ratio above 1 means better than the limit. Sparsity: share of inputs left out of "
        "histories padded to the longest, log-normal before they are cut, with a median of 3,443 and a sigma of 1.8 "
        "that were fitted to the paper's four figures.",
    ),
    "prepare": Topic(
        title="Preparing event logs",
        note="`python -m hstu_dist prepare data=events` as a process of its own, from Parquet to sequences, with "
        "DuckDB; peak memory is resident memory of that process. A ratio above 1 means better than the limit.",
        headlines={
            "100 million events, limit of 60 s over time:": (
                "100 million events of 4 million users, Zipf, memory_gib=3.8",
                "time",
                "60 s",
                "duckdb",
            )
        },
    ),
    "stream": Topic(
        title="Streams",
        note="Steady: files of a synthetic stream to training batches, read, checked, joined to histories and written "
        "down for restarts by one process. MovieLens-1M by weeks: each event is predicted among all items before it is "
        "trained on, once; means over all events. A ratio above 1 means better than the limit.",
        headlines={
            "MovieLens-1M by weeks, HR@10 of HSTU over popularity:": (
                "MovieLens-1M by weeks",
                "hr@10",
                "hstu",
                "popularity",
            )
        },
    ),
    "checkpoint": Topic(title="Checkpoints", note="A ratio above 1, or above its target, means better than the limit."),
    "plan": Topic(
        title="Capacity planner",
        note="Time and memory of `python -m hstu_dist plan` itself, and what it predicts against what was measured: "
        "growth of the fullest rank's process (tables, optimizers, tower, gradients), and bytes that autograd saves.",
    ),
    "faults": Topic(
        title="Fault campaign",
        note="Real faults at random steps of small runs over gloo on one machine; recovered means that the run ended "
        "with every sequence trained on exactly once an epoch and with the metrics of a run that was left alone, "
        "within 0.02 where the number of ranks changed and 0.05 where a batch was left out, exactly otherwise.",
    ),
    "launch": Topic(title="Launch", note="Seconds from the command to the first step, two ranks, tiny model."),
    "kernels": Topic(
        title="Triton kernels compiled ahead of time", note="Without a GPU: what the compiler reports, not a speed."
    ),
}
"""Shown first and in this order; other result files follow under their own names."""


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
    rows = [_rows_of(name, results) for name, results in measured.items() if _topic(name).metrics]
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


def _rows_of(name: str, results: Results) -> str:
    topic = _topic(name)
    return f"**{topic.title}.** {topic.note}\n\n{rows_table(results, topic.metrics)}\n{_origin(results)}\n"


def _headlines(name: str, results: Results) -> dict[str, float]:
    found = {(ratio.case, ratio.metric, ratio.a, ratio.b): ratio.value for ratio in results.ratios}
    return {text: found[key] for text, key in _topic(name).headlines.items() if key in found}


def _section(checkout: Checkout, name: str, results: Results) -> str:
    topic = _topic(name)
    parts = [f"## {topic.title}", topic.note, _origin(results)]
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
        yield rows_table(Results(**{**vars(results), "rows": rows}), metrics).rstrip()


def _who(row: Row) -> tuple[str, str]:
    return row.case, row.contender


def _plots(checkout: Checkout, name: str) -> Iterator[str]:
    for folder in (checkout.results, checkout.page.parent / "figures"):
        for path in sorted(folder.glob(f"{name}_*.svg")):
            yield f"![{path.stem.replace('_', ' ')}]({os.path.relpath(path, checkout.page.parent)})"


def _topic(name: str) -> Topic:
    return TOPICS.get(name, Topic(title=name.replace("_", " "), note=""))


def _origin(results: Results) -> str:
    device = f"{results.device}, {results.threads} threads"
    commit, changed, _ = results.commit.partition("+")
    state = f"{commit[:12]} with uncommitted changes" if changed else commit[:12]
    return f"Measured by `{results.command}` on {device}, {results.date[:10]}, commit {state}."
