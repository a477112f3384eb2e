"""`scale fit` and `scale plan`: the law of a sweep, and what it takes to reach a value; no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hstu_dist.commands.plan import is_hardware, job_of, settings_of
from hstu_dist.commands.scale_cells import read_points, training_compute
from hstu_dist.config import RunConfig, compose, conf_dir
from hstu_dist.data.config import AppendixCConfig
from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically
from hstu_dist.plan.report import Plan
from hstu_dist.scaling.points import Accepted, accept
from hstu_dist.scaling.study import Study, law_of
from hstu_dist.scaling.table import write_points

FIT_FOLDER = "fit"


def fit(sweep: Path, metric: str, output: Path | None, say: Callable[[str], None]) -> Study:
    """Fits the finished runs of a sweep; writes `METRIC.json`, .parquet, .md, .png and .svg.

    Args:
        sweep: folder of its runs.
        metric: of the test split.
        output: where files go; None: `fit` in the sweep's folder.
        say: prints lines for the user.

    Returns:
        What was written.

    Raises:
        UserError: too few finished cells, or cells that belong to no common curve.
    """
    points, unusable = read_points(sweep)
    for line in unusable:
        say(line)
    accepted = accept(points, metric)
    study = Study.of(Accepted(accepted.points, (*unusable, *accepted.excluded)), metric)
    stem = _stem(output or sweep / FIT_FOLDER, metric)
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(stem.with_suffix(".json"), (json.dumps(study.document(), indent=1) + "\n").encode())
    write_points(study.points, stem.with_suffix(".parquet"))
    write_atomically(stem.with_suffix(".md"), study.markdown().encode())
    say(study.markdown())
    for path in (stem.with_suffix(suffix) for suffix in (".json", ".parquet", ".md")):
        say(str(path))
    for path in _draw(study, stem):
        say(str(path))
    return study


def plan(sweep: Path, metric: str, target: float, overrides: Sequence[str], say: Callable[[str], None]) -> None:
    """What each family of a fitted sweep needs to reach a value: FLOPs, a rung of the ladder, and GPU-days.

    Args:
        sweep: folder of its runs, already fitted.
        metric: that was fitted.
        target: its value.
        overrides: `cluster=NAME` chooses the hardware, as for `plan`.
        say: prints lines for the user.

    Raises:
        UserError: the sweep is not fitted or has no law, no cluster is named, or no family reaches the target.
    """
    file = _stem(sweep / FIT_FOLDER, metric).with_suffix(".json")
    if not file.exists():
        raise UserError(f"{file}: not found", f"fit it first: python -m hstu_dist scale fit {sweep} --metric {metric}")
    fitted: dict[str, Any] = json.loads(file.read_text())
    if not any(family["law"] for family in fitted["families"]):
        raise UserError(f"{file}: holds no law, only optima at equal compute", "plan from a sweep of more budgets")
    reached = False
    for family in fitted["families"]:
        if family["law"] is None:
            say(f"{family['family']}: has no law, too few budgets")
            continue
        needed = law_of(family, family["parameters"]).compute_for(target)
        if math.isinf(needed):
            law = family["parameters"]
            floor = f"its law ends at {law['E']:.4f}" if "E" in law else "its law does not rise to it"
            say(f"{family['family']}: never reaches {metric} {target:g}, {floor}")
            continue
        reached = True
        say(_needs(family, needed, target))
        say(_rung(family["family"], needed, _measured(fitted, family["family"]), overrides))
    if not reached:
        raise UserError(f"--target {target:g}: no family reaches it", "give a value that a law of the fit can reach")


def _stem(folder: Path, metric: str) -> Path:
    """Of the files of a metric."""
    return folder / metric.replace("/", "_").replace("@", "_at_")


def _needs(family: dict[str, Any], needed: float, target: float) -> str:
    others = [law_of(family, parameters).compute_for(target) for parameters in family["resampled"]]
    low, high = np.quantile(others, (0.05, 0.95), method="nearest")
    return (
        f"{family['family']}: {family['metric']} {target:g} takes {needed:.3g} FLOPs of training "
        f"(90%: {low:.3g} to {'beyond reach' if math.isinf(high) else f'{high:.3g}'})"
    )


def _measured(fitted: dict[str, Any], family: str) -> float:
    """Compute of the largest measured run."""
    return max(float(point["compute"]) for point in fitted["points"] if point["family"] == family)


def _rung(experiment: str, needed: float, largest: float, overrides: Sequence[str]) -> str:
    """The first rung of the ladder with so much compute, planned on the cluster."""
    rungs = _ladder(experiment, [word for word in overrides if not is_hardware(word)])
    if not rungs:
        raise UserError(f"{experiment}: no such experiment in conf/experiment", "fit a sweep over experiments")
    size, compute = next(((s, c) for s, c in rungs if c >= needed), rungs[-1])
    cluster, hardware, config = settings_of([f"experiment={experiment}", f"size={size}", *overrides])
    # a step that gives every rank something to do
    sequences = max(config.trainer.global_batch_size, hardware.ranks)
    tokens = round(_tokens(config) * needed / compute)
    settings = replace(config.plan, dataset_tokens=max(1, tokens), num_items=config.plan.num_items or _items(config))
    job = replace(job_of(replace(config, plan=settings)), global_batch_size=sequences)
    planned = Plan.of(config.name, job, hardware, settings)
    low, high = (planned.gpu_days(seconds) for seconds in (planned.time.bound, planned.time.serial))
    assert low is not None
    assert high is not None
    model, _ = config.retrieval
    fits = "fits" if not planned.shortages else f"does not fit: {'; '.join(planned.shortages)}"
    beyond = f"; {needed / largest:.1f} x the largest measured run" if needed > largest else ""
    return (
        f"  size={size}: {model.num_layers} layers of {model.width}, length {model.max_length}, "
        f"{planned.parameters:,} parameters, {tokens:.3g} tokens{beyond}\n"
        f"  at least {low:.3g} GPU-days on {hardware.ranks} x {hardware.chip.name} ({cluster}), "
        f"{high:.3g} with nothing overlapped; {fits}"
    )


def _ladder(experiment: str, overrides: Sequence[str]) -> list[tuple[str, int]]:
    """Rungs with changed settings and their compute, ascending."""
    if not (conf_dir() / "experiment" / f"{experiment}.yaml").exists():
        return []
    names = sorted(file.stem for file in (conf_dir() / "size").glob("s[0-9][0-9].yaml"))
    words = [[f"experiment={experiment}", f"size={name}", *overrides] for name in names]
    computed = [(name, training_compute(compose(rung))) for name, rung in zip(names, words, strict=True)]
    return sorted(((name, compute) for name, compute in computed if compute), key=lambda rung: rung[1])


def _tokens(config: RunConfig) -> int:
    """Inputs of a run on the ladder."""
    cut = config.record_split
    assert cut is not None
    assert cut.train is not None
    return cut.train * config.data.max_length


def _items(config: RunConfig) -> int | None:
    """Of a stream that need not have been made; None: the prepared data set knows."""
    return config.data.num_items if isinstance(config.data, AppendixCConfig) else None


def _draw(study: Study, stem: Path) -> tuple[Path, ...]:
    # matplotlib takes half a second to import
    from hstu_dist.report.scaling_plots import save_study

    return save_study(study, stem)
