"""`plan`: memory and least time of a run on a cluster that need not exist, as tables, JSON and a plot; no torch."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from hstu_dist.config import HARDWARE, RunConfig, compose, compose_dict, hardware_names
from hstu_dist.data.config import prepare_command
from hstu_dist.data.schema import load_manifest
from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically
from hstu_dist.plan.config import HardwareConfig
from hstu_dist.plan.job import Job
from hstu_dist.plan.report import Lines, Plan
from hstu_dist.plugins import PluginConfig
from hstu_dist.preflight import check_average, check_ranks
from hstu_dist.validation import as_user_error

_MOST_CHANGES_SHOWN = 3


def plan_run(overrides: Sequence[str], folder: Path | None, say: Callable[[str], None]) -> None:
    """Plans a run, shows the plan and writes `<folder>/<run>-<cluster>.json`, .png and .svg.

    Args:
        overrides: of the run; those of `cluster` choose and change the hardware.
        folder: where files go; None: `plans` in the folder of all runs.
        say: prints lines for the user.

    Raises:
        UserError: a setting cannot be used, or not with so many ranks; or the plan does not fit, after all has been
            shown and written.
    """
    cluster, hardware, config = settings_of(overrides)
    check_ranks(config, hardware.ranks)
    check_average(config)
    plan = Plan.of(config.name, job_of(config), hardware, config.plan)
    say(tables(plan, cluster))
    stem = (folder or Path(config.output) / "plans") / f"{config.name}-{cluster}"
    path = stem.with_name(f"{stem.name}.json")
    write_atomically(path, (json.dumps(plan.document(), indent=2, allow_nan=False) + "\n").encode())
    say(str(path))
    for drawn in _draw(plan, f"{config.name} on {cluster}", stem):
        say(str(drawn))
    if plan.shortages:
        several = "; or ".join(plan.changes[:_MOST_CHANGES_SHOWN])
        raise UserError(
            f"the plan does not fit: {'; '.join(plan.shortages)}",
            f"use {several}" if several else "use a smaller model or table: no change of run or ranks was enough",
        )


def settings_of(overrides: Sequence[str]) -> tuple[str, HardwareConfig, RunConfig]:
    """Name and settings of the hardware, and the run, from overrides of both.

    Raises:
        UserError: no such cluster, an unknown key, or a value that a check refuses.
    """
    mine = [word for word in overrides if is_hardware(word)]
    names = [word.partition("=")[2] for word in mine if word.startswith("cluster=")]
    known = hardware_names()
    if len(names) != 1 or names[0] not in known:
        got = ", ".join(names) if names else "nothing"
        raise UserError(f"cluster: got {got}, expected one of {', '.join(known)}", "give cluster=NAME")
    changes = [word[len("cluster.") :] for word in mine if not word.startswith("cluster=")]
    values = compose_dict(names[0], changes, folder=HARDWARE)
    try:
        hardware = TypeAdapter(HardwareConfig).validate_python(values)
    except ValidationError as error:
        raise as_user_error(error, "cluster", values) from error
    return names[0], hardware, compose([word for word in overrides if word not in mine])


def job_of(config: RunConfig) -> Job:
    """What a step of a run needs; reads the prepared data set if the settings do not say how many items there are.

    Raises:
        UserError: there is no prepared data set, or sequences are said to be longer than the model's.
    """
    items, length = config.plan.num_items, config.plan.mean_length or config.data.max_length
    if items is None:
        if isinstance(config.data, StreamConfig):
            items = config.data.num_items
        else:
            items = load_manifest(Path(config.data.path), prepare_command(config.data)).num_items
    if length > config.data.max_length:
        raise UserError(
            f"plan.mean_length: got {length}, expected at most data.max_length ({config.data.max_length})",
            "correct it in YAML or as key=value",
        )
    model, loss = config.retrieval
    if isinstance(model, PluginConfig) or isinstance(loss, PluginConfig):
        raise UserError("model, loss: got plugin, whose memory and time are not known", "plan a model of this package")
    job = Job(
        model=model,
        loss=loss,
        embedding=config.embedding,
        num_items=items,
        global_batch_size=config.trainer.global_batch_size,
        mean_length=length,
        parallel=config.trainer.parallel,
        micro_batches=config.trainer.micro_batches,
        averaged=config.optimizer.average_decay is not None,
    )
    batching = config.trainer.batching
    if batching.budget is None:
        return job
    one = job.flops(1).training if batching.by == "flops" else length
    return replace(job, global_batch_size=max(1, round(batching.budget / one)))


def tables(plan: Plan, cluster: str) -> str:
    """The plan as text."""
    hardware = plan.hardware
    place = f"{hardware.ranks} x {hardware.chip.name} ({cluster}: {hardware.nodes} nodes, {hardware.fabric.name})"
    text = io.StringIO()
    # a fixed width: the tables also go into files and logs
    console = Console(file=text, width=100)
    console.print(f"{plan.name}: {plan.parameters:,} parameters on {place}", highlight=False)
    console.print(_table("a rank", "memory", plan.memory_lines()))
    console.print(_table("a step", "lower bound", plan.time_lines()))
    for assumption in plan.assumptions:
        console.print(f"* {assumption}", highlight=False)
    console.print("fits" if not plan.shortages else "DOES NOT FIT")
    for change in plan.changes:
        console.print(f"  fits with {change}", highlight=False)
    return text.getvalue().rstrip()


def _table(first: str, second: str, lines: Lines) -> Table:
    table = Table()
    table.add_column(first)
    table.add_column(second, justify="right")
    for line in lines:
        table.add_row(*line)
    return table


def is_hardware(override: str) -> bool:
    """Whether an override chooses or changes the hardware, not the run."""
    return override.startswith(("cluster=", "cluster.", "cluster/"))


def _draw(plan: Plan, title: str, stem: Path) -> tuple[Path, ...]:
    # matplotlib takes half a second to import
    from hstu_dist.report.plots import save_sweep

    stacks = {ranks: vars(memory) for ranks, (memory, _) in plan.sweep.items()}
    times = {
        "all overlapped": {ranks: time.bound for ranks, (_, time) in plan.sweep.items()},
        "nothing overlapped": {ranks: time.serial for ranks, (_, time) in plan.sweep.items()},
    }
    return save_sweep(stacks, times, plan.limit, title, stem)
