"""A data set of 60 users and 40 items, and settings with which a whole run on it takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hstu_dist.data.config import EventsConfig
from hstu_dist.data.prepare import prepare

NUM_USERS = 60
NUM_ITEMS = 40
MAX_LENGTH = 16


def write_tiny_dataset(folder: Path) -> Path:
    """Prepares the data set in `folder`/tiny and returns that path.

    Every user walks through the catalogue with a stride of 1, 2 or 3, now and then at random, so that there is
    something to learn; users have 6 to 20 events.
    """
    random = np.random.default_rng(7)
    lines = ["user_id,item_id,timestamp"]
    for user in range(NUM_USERS):
        item, time = int(random.integers(NUM_ITEMS)), 1_000_000_000 + user
        for _ in range(int(random.integers(6, 21))):
            lines.append(f"{user},{item},{time}")
            item = int(random.integers(NUM_ITEMS)) if random.random() < 0.1 else (item + 1 + user % 3) % NUM_ITEMS
            time += int(random.integers(60, 100_000))
    folder.mkdir(parents=True, exist_ok=True)
    events = folder / "events.csv"
    events.write_text("\n".join(lines) + "\n")
    target = folder / "tiny"
    prepare(EventsConfig(input=str(events), path=str(target), max_length=MAX_LENGTH))
    return target


def tiny_overrides(data: Path, output: Path) -> list[str]:
    """Overrides of a run `output`/tiny on a data set of `write_tiny_dataset`: 2 epochs of 8 steps, 2 ranks, CPU."""
    return [
        "name=tiny",
        "data=events",
        f"data.path={data}",
        f"data.max_length={MAX_LENGTH}",
        f"output={output}",
        "nproc=2",
        "model.width=8",
        "loss.num_negatives=8",
        "trainer.epochs=2",
        "trainer.global_batch_size=8",
        "trainer.device=cpu",
        "trainer.timeout_seconds=60",
        "trainer.evaluation.cutoffs=[1,10]",
        "trainer.logging.progress=false",
        "trainer.logging.tensorboard=false",
        "trainer.logging.report=false",
    ]


def result_of(run_folder: Path) -> dict[str, Any]:
    """What a run computed: its result.json without the timings, which differ between equal runs."""
    result: dict[str, Any] = json.loads((run_folder / "result.json").read_text())
    assert result.pop("speed")["train_seconds"] > 0
    return result
