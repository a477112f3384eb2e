"""Run folders as a finished sweep leaves them, without the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hstu_dist.commands.scale_cells import remember_cells, training_compute
from hstu_dist.config import RunConfig, compose, save
from hstu_dist.run_folder import RunFolder
from hstu_dist.scaling.law import PowerLaw

LAWS = {
    "scaling_hstu": PowerLaw(4.2, 1.5, 0.2, 1e12),
    "scaling_sasrec": PowerLaw(4.3, 1.7, 0.2, 1e12),
}
SIZES = ("s01", "s02", "s03", "s04", "s05", "s06")


def write_run(folder: Path, experiment: str, size: str, **changed: Any) -> RunConfig:
    """A finished cell whose loss lies on the law of its experiment; `changed` replaces parts of its result."""
    words = [f"experiment={experiment}", f"size={size}", f"output={folder}", f"name={experiment}_{size}"]
    words += changed.pop("words", [])
    config = compose(words)
    compute = training_compute(config)
    assert compute is not None
    loss = float(LAWS[experiment].at(compute))
    result = {
        "epochs": 1,
        "stopped_early": False,
        "dense_parameters": 10 * config.model.width**2,
        "speed": {"training_flops": compute, "tokens_per_second": 1000.0, "train_seconds": 50.0},
        "test": {"loss": loss, "hr@10": 1 - loss / 10},
        **changed,
    }
    run = RunFolder(config.run_dir)
    run.path.mkdir(parents=True, exist_ok=True)
    save(config, run.config_file)
    run.result_file.write_text(json.dumps(result))
    remember_cells(folder, {config.name: words})
    return config


def write_sweep(folder: Path) -> None:
    """Six sizes of both experiments."""
    for experiment in LAWS:
        for size in SIZES:
            write_run(folder, experiment, size)
