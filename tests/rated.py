"""A data set of 40 users who rate 30 items, and a ranking run on it that takes seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hstu_dist.data.config import EventsConfig
from hstu_dist.data.prepare import prepare

NUM_USERS = 40
NUM_ITEMS = 30
MAX_LENGTH = 12


def write_rated_dataset(folder: Path, constant: int | None = None) -> Path:
    """Prepares the data set in `folder`/rated and returns that path.

    A user likes every second item, or every third, whichever was rated well before; so histories tell. Users begin at
    different times and have 3 to 20 events. `constant`, if given, is what everybody rates everything.
    """
    random = np.random.default_rng(3)
    lines = ["user_id,item_id,timestamp,rating"]
    for user in range(NUM_USERS):
        time, stride = 1_000_000_000 + 50_000 * user, 2 + user % 2
        for _ in range(int(random.integers(3, 21))):
            item = int(random.integers(NUM_ITEMS))
            liked = (item % stride == 0) ^ (random.random() < 0.1)
            rating = int(random.integers(4, 6)) if liked else int(random.integers(1, 4))
            lines.append(f"{user},{item},{time},{rating if constant is None else constant}")
            time += int(random.integers(60, 200_000))
    folder.mkdir(parents=True, exist_ok=True)
    events = folder / "ratings.csv"
    events.write_text("\n".join(lines) + "\n")
    target = folder / "rated"
    log = EventsConfig(input=str(events), path=str(target), max_length=MAX_LENGTH, action_column="rating")
    prepare(log)
    return target


def rated_overrides(data: Path, output: Path, model: str = "hstu") -> list[str]:
    """Overrides of a run `output`/rated on a data set of `write_rated_dataset`: 2 epochs, 2 ranks, CPU."""
    return [
        "name=rated",
        "task=ranking",
        "task.contextual=[user]",
        "loss=ratings",
        "data=events",
        f"data.path={data}",
        f"data.max_length={MAX_LENGTH}",
        f"output={output}",
        f"model={model}",
        "model.width=8",
        "nproc=2",
        "trainer.epochs=2",
        "trainer.global_batch_size=8",
        "trainer.device=cpu",
        "trainer.timeout_seconds=60",
        "trainer.evaluation.monitor=like/auc",
        "trainer.logging.progress=false",
        "trainer.logging.tensorboard=false",
    ]
