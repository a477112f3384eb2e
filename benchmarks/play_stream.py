"""A prepared data set as a stream that has ended: one Parquet file a week, in order of time.

python -m benchmarks.play_stream data/ml1m data/ml1m_weeks
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.stream.config import StreamConfig

log = logging.getLogger(__name__)

END = "_SUCCESS"


def play(prepared: Path, folder: Path) -> int:
    """Writes the events of a prepared data set into `folder`, unless that was done before.

    Returns:
        How many files there are.
    """
    if (folder / END).exists():
        return len(list(folder.glob("week=*/events.parquet")))
    dataset = SequenceDataset.open(prepared)
    users = np.repeat(np.arange(dataset.num_sequences), dataset.lengths)
    # stable: events of a user with equal times stay in their order
    order = np.argsort(dataset.timestamps, kind="stable")
    seconds = dataset.timestamps[order]
    columns: dict[str, npt.NDArray[Any]] = {
        "user_id": users[order],
        "item_id": dataset.item_ids[order],
        "timestamp": seconds,
        "action": dataset.actions[order],
    }
    calendar = StreamConfig(path=str(folder), num_items=dataset.num_items, window_length="week")
    weeks = calendar.window_of(seconds)
    firsts = np.flatnonzero(np.diff(weeks, prepend=weeks[0] - 1))
    for first, last in zip(firsts.tolist(), [*firsts[1:].tolist(), len(weeks)], strict=True):
        monday = np.datetime64(calendar.start_of(int(weeks[first])), "s").astype("datetime64[D]")
        file = folder / f"week={monday}" / "events.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        # a name that a stream leaves alone, until the file is whole
        unfinished = file.with_name("_events.parquet")
        pq.write_table(pa.table({name: values[first:last] for name, values in columns.items()}), unfinished)
        unfinished.rename(file)
    (folder / END).touch()
    return len(firsts)


def main() -> None:
    """Plays what the command line names."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prepared", type=Path, help="folder of a prepared data set")
    parser.add_argument("folder", type=Path, help="of the stream")
    options = parser.parse_args()
    log.info("%s: %d weeks", options.folder, play(options.prepared, options.folder))


if __name__ == "__main__":
    main()
