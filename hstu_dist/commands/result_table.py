"""The result of a run beside the popularity baseline and the published figures, as text."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

from hstu_dist.config import RunConfig
from hstu_dist.models.config import RankingConfig


def finished_report(config: RunConfig, result: dict[str, Any]) -> str:
    """What a run that has nothing left to train shows: where it ended, and its result."""
    ended = f"run {config.run_dir}: already finished at epoch {result['epochs']}, step {result['steps']}"
    return f"{ended}\n{result_table(config, result)}"


def result_table(config: RunConfig, result: dict[str, Any]) -> str:
    """One row a metric: this run's test figure, popularity and, where there are any, published and best test epoch's.

    Args:
        config: the run.
        result: what the run wrote to result.json.
    """
    reference = result.get("reference_protocol")
    simple = "item averages" if isinstance(config.task, RankingConfig) else "popularity"
    columns = {config.model.kind: result["test"], simple: result["popularity"]}
    if config.published:
        columns["published"] = config.published
    if reference:
        columns[f"best test epoch ({reference['best_epoch']})*"] = reference["test"]
    table = Table()
    table.add_column("metric")
    for column in columns:
        table.add_column(column, justify="right")
    for metric in result["test"]:
        table.add_row(metric, *(f"{c[metric]:.4f}" if metric in c else "" for c in columns.values()))
    text = io.StringIO()
    # a fixed width: the table also goes into files and logs
    Console(file=text, width=100).print(table)
    note = "\n* for comparison with published tables only: the epoch was chosen on the test split" if reference else ""
    return f"{_title(config, result)}\n{text.getvalue().rstrip()}{note}"


def _title(config: RunConfig, result: dict[str, Any]) -> str:
    if result.get("protocol") == "prequential":
        return f"{config.name}: all events of {result['epochs']} windows, each predicted before it was trained on"
    if "best_epoch" in result:
        return f"{config.name}: test at the best validation epoch ({result['best_epoch']} of {result['epochs']})"
    return f"{config.name}: test after {result['epochs']} epochs on the training and validation events"
