"""The result of a run beside the popularity baseline and the published figures, as text."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

from hstu_dist.config import RunConfig


def finished_report(config: RunConfig, result: dict[str, Any]) -> str:
    """What a run that has nothing left to train shows: where it ended, and its result."""
    ended = f"run {config.run_dir}: already finished at epoch {result['epochs']}, step {result['steps']}"
    return f"{ended}\n{result_table(config, result)}"


def result_table(config: RunConfig, result: dict[str, Any]) -> str:
    """One row a metric: this run's test figure, popularity, published.

    Args:
        config: the run.
        result: what the run wrote to result.json.
    """
    title = f"{config.name}: test at the best validation epoch ({result['best_epoch']} of {result['epochs']})"
    table = Table()
    table.add_column("metric")
    for column in (config.model.kind, "popularity", "published"):
        table.add_column(column, justify="right")
    for metric, value in result["test"].items():
        published = config.published.get(metric)
        table.add_row(
            metric,
            f"{value:.4f}",
            f"{result['popularity'][metric]:.4f}",
            "" if published is None else f"{published:.4f}",
        )
    text = io.StringIO()
    # a fixed width: the table also goes into files and logs
    Console(file=text, width=100).print(table)
    return f"{title}\n{text.getvalue().rstrip()}"
