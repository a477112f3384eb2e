"""The sections of a run report: tables of text, with a column for every run that is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from hstu_dist.config import as_yaml, compose, flatten, to_dict
from hstu_dist.errors import UserError
from hstu_dist.report.run_data import RunData
from hstu_dist.report.run_plots import curves, shares

_DASH = "-"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        head: of all columns, the one of the rows' names first.
        rows: as wide as the head.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        title: heading.
        note: what a reader must know.
        tables: shown first.
        figures: SVG, shown next.
        texts: title → preformatted text, folded.
    """

    title: str
    note: str = ""
    tables: tuple[Table, ...] = ()
    figures: tuple[str, ...] = ()
    texts: Mapping[str, str] | None = None


def sections(runs: Sequence[RunData]) -> list[Section]:
    """All sections that have something to show."""
    parts = (_result, _curves, _speed, _time, _tables, _data, _balance, _warnings, _settings, _environment)
    found = [part(runs) for part in parts]
    return [section for section in found if section.tables or section.figures or section.texts]


def headline(run: RunData) -> list[tuple[str, str]]:
    """The few figures of a run that are looked for first, name and text."""
    result, monitor = run.result, run.config.trainer.evaluation.monitor
    speed = result.get("speed", {})
    found = [("state", state_of(run))]
    if monitor in result.get("test", {}):
        found.append((f"test {monitor}", _number(result["test"][monitor])))
        if monitor in result.get("popularity", {}):
            found.append(("without a model", _number(result["popularity"][monitor])))
    if speed.get("tokens_per_second"):
        found.append(("tokens/s", f"{speed['tokens_per_second']:,.0f}"))
    if speed.get("mfu"):
        found.append(("MFU", f"{speed['mfu']:.1%}"))
    peak = [value for _, value in run.line("memory/peak_gib_per_rank")]
    if peak:
        found.append(("memory of the fullest rank", f"{max(peak):.2f} GiB"))
    return found


def state_of(run: RunData) -> str:
    """How far a run is, in words."""
    result = run.result
    if not result:
        steps = run.metrics[-1]["step"] if run.metrics else 0
        return f"not finished, step {steps}"
    early = ", stopped early" if result.get("stopped_early") else ""
    unit = "windows" if result.get("protocol") == "prequential" else "epochs"
    return f"finished, {result['epochs']} {unit}{early}"


def _result(runs: Sequence[RunData]) -> Section:
    columns: dict[str, Mapping[str, float]] = {}
    for run in runs:
        if run.result:
            columns[_name(run)] = run.result["test"]
    if len(runs) == 1 and runs[0].result:
        (run,) = runs
        columns["popularity or item averages"] = run.result["popularity"]
        columns |= {"published": run.config.published} if run.config.published else {}
        if "reference_protocol" in run.result:
            columns["best test epoch, for comparison"] = run.result["reference_protocol"]["test"]
    metrics = dict.fromkeys(name for values in columns.values() for name in values)
    rows = [(name, *(_number(values.get(name)) for values in columns.values())) for name in metrics]
    return Section(
        title="Test",
        note="Read once, at the epoch that validation chose; on a stream, means over all events, each predicted before "
        "it was trained on.",
        tables=_tables_of(("metric", *columns), rows),
    )


def _curves(runs: Sequence[RunData]) -> Section:
    chosen = dict.fromkeys(run.config.trainer.evaluation.monitor for run in runs)
    names = ["train/loss", *(f"validation/{name}" for name in chosen), *(f"prequential/model/{n}" for n in chosen)]
    return Section(title="Learning curves", figures=_figures(runs, names))


def _speed(runs: Sequence[RunData]) -> Section:
    def facts(run: RunData) -> Iterator[tuple[str, str]]:
        result, speed = run.result, run.result.get("speed", {})
        yield "ranks", str(result.get("world_size", run.config.world_size))
        yield "steps", _count(result.get("steps"))
        yield "refused steps", _count(result.get("refused_steps"))
        yield "dense parameters", _count(result.get("dense_parameters"))
        yield "training FLOPs", f"{speed['training_flops']:.3g}" if speed.get("training_flops") else _DASH
        yield "tokens/s", _count(speed.get("tokens_per_second"))
        yield "MFU", f"{speed['mfu']:.1%}" if speed.get("mfu") else _DASH
        peak = [value for _, value in run.line("memory/peak_gib_per_rank")]
        yield "peak memory of the fullest rank, GiB", f"{max(peak):.2f}" if peak else _DASH

    names = ["speed/tokens_per_second", "speed/mfu", "memory/peak_gib_per_rank"]
    return Section(
        title="Speed and memory",
        note="FLOPs are those that the model needs; MFU is their rate over the peak of all ranks' devices.",
        tables=_facts(runs, facts),
        figures=_figures(runs, names),
    )


def _time(runs: Sequence[RunData]) -> Section:
    parts: dict[str, dict[str, float]] = {}
    for run in runs:
        speed = run.result.get("speed", {})
        if speed.get("train_seconds"):
            parts[_name(run)] = {"training": speed["train_seconds"], "evaluation": speed["evaluation_seconds"]}
    traces = [run.folder.path / "step.svg" for run in runs]
    pictures = [_inline(path.read_text()) for path in traces if path.exists()]
    bars = [shares(parts, "seconds by the clock of rank 0")] if parts else []
    return Section(
        title="Time",
        note="Training is all between the first and the last step but evaluation: data, steps, checkpoints, logs. "
        "Parts of a step are drawn where `trainer.profile.first_step` was set.",
        figures=(*bars, *pictures),
    )


def _tables(runs: Sequence[RunData]) -> Section:
    rows, loads = [], {}
    for run in runs:
        load: dict[int, int] = {}
        for name, table in run.plan.get("tables", {}).items():
            for shard in table["shards"]:
                load[shard["rank"]] = load.get(shard["rank"], 0) + shard["rows"] * shard["columns"]
            facts = (name, f"{table['rows']:,}", str(table["width"]), table["dtype"], table["sharding"])
            rows.append((_name(run), *facts, table["compute_kernel"], str(len(table["shards"]))))
        if load:
            loads[_name(run)] = load
    head = ("run", "table", "rows", "width", "dtype", "sharding", "kernel", "shards")
    balance = [(name, *_spread(list(load.values()))) for name, load in loads.items()]
    return Section(
        title="Embedding tables",
        tables=(
            *_tables_of(head, rows),
            *_tables_of(("run", "elements of the fullest rank", "over the mean"), balance),
        ),
    )


def _spread(loads: list[int]) -> tuple[str, str]:
    return f"{max(loads):,}", f"{max(loads) / fmean(loads):.3f}"


def _data(runs: Sequence[RunData]) -> Section:
    def facts(run: RunData) -> Iterator[tuple[str, str]]:
        manifest = run.manifest
        yield "data", run.config.data.path
        if manifest is None:
            return
        yield "users", f"{manifest.num_users:,}"
        yield "items", f"{manifest.num_items:,}"
        yield "events", f"{manifest.num_events:,}"
        yield "mean length", f"{manifest.mean_length:,.1f}"
        yield "longest", f"{manifest.max_length:,}"
        for name, value in manifest.statistics.items():
            yield name.replace("_", " "), f"{value:,}"

    return Section(title="Data", tables=_facts(runs, facts))


def _balance(runs: Sequence[RunData]) -> Section:
    def facts(run: RunData) -> Iterator[tuple[str, str]]:
        for label, name in (
            ("imbalance of work, mean over logged steps", "speed/imbalance"),
            ("had nobody balanced it", "speed/imbalance_in_turns"),
            ("slowest rank's forward over the median", "ranks/slowest_over_median"),
        ):
            values = [value for _, value in run.line(name)]
            yield label, f"{fmean(values):.3f}" if values else _DASH

    balanced = [run for run in runs if run.line("speed/imbalance") or run.line("ranks/slowest_over_median")]
    return Section(
        title="Balance of the ranks",
        note="Imbalance is the work of the busiest rank over the mean, minus 1.",
        tables=_facts(balanced, facts) if balanced else (),
    )


def _warnings(runs: Sequence[RunData]) -> Section:
    rows = [(_name(run), message, str(count)) for run in runs for message, count in run.warnings.items()]
    return Section(title="Warnings", tables=_tables_of(("run", "message", "times"), rows))


def _settings(runs: Sequence[RunData]) -> Section:
    columns: dict[str, dict[str, Any]] = {}
    if len(runs) == 1:
        origin = _default_of(runs[0])
        columns |= {} if origin is None else {f"experiment={runs[0].config.experiment}": origin}
    columns |= {_name(run): flatten(to_dict(run.config)) for run in runs}
    keys = sorted({key for values in columns.values() for key in values})
    rows = [
        (key, *(str(values.get(key, _DASH)) for values in columns.values()))
        for key in keys
        if len({str(values.get(key)) for values in columns.values()}) > 1
    ]
    return Section(
        title="Settings",
        note="What differs: between the runs, or from the experiment that the run began with.",
        tables=_tables_of(("key", *columns), rows) if len(columns) > 1 else (),
        texts={f"all settings of {_name(run)}": as_yaml(run.config) for run in runs},
    )


def _default_of(run: RunData) -> dict[str, Any] | None:
    """Settings of the run's experiment as it is today; None: it had none, or it is no longer there."""
    if not run.config.experiment:
        return None
    try:
        return flatten(to_dict(compose([f"experiment={run.config.experiment}"])))
    except UserError:
        return None


def _environment(runs: Sequence[RunData]) -> Section:
    def facts(run: RunData) -> Iterator[tuple[str, str]]:
        for name, value in run.environment.items():
            if name == "versions":
                yield from value.items()
            elif name == "continued":
                for later in value:
                    yield f"went on {later['date']}", f"commit {later['commit']}, {later['machine']}"
            else:
                yield name, " ".join(value) if isinstance(value, list) else str(value)

    return Section(title="Environment", tables=_facts(runs, facts))


def _figures(runs: Sequence[RunData], metrics: Sequence[str]) -> tuple[str, ...]:
    """One figure with a panel for each metric that any run has."""
    panels = {name: {_name(run): run.line(name) for run in runs if run.line(name)} for name in metrics}
    panels = {name: lines for name, lines in panels.items() if lines}
    return (curves(panels),) if panels else ()


def _facts(runs: Sequence[RunData], facts: Callable[[RunData], Iterator[tuple[str, str]]]) -> tuple[Table, ...]:
    """A row a fact, a column a run."""
    columns = [dict(facts(run)) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    return _tables_of(
        ("", *map(_name, runs)), [(name, *(column.get(name, _DASH) for column in columns)) for name in names]
    )


def _tables_of(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> tuple[Table, ...]:
    return (Table(head, tuple(rows)),) if rows else ()


def _name(run: RunData) -> str:
    return str(run.folder.path)


def _number(value: float | None) -> str:
    return _DASH if value is None else f"{value:.4f}"


def _count(value: float | None) -> str:
    return _DASH if value is None else f"{value:,.0f}"


def _inline(svg: str) -> str:
    """An SVG file without what only a file needs."""
    return svg[svg.index("<svg") :]
