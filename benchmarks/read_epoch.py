"""Reads an epoch of training batches in a process of its own and prints seconds and events; see `prepare`."""

from __future__ import annotations

import sys
import time

import torch

from hstu_dist.data.config import LoaderConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.loader import BatchLoader
from hstu_dist.data.split import Split


def main(path: str) -> str:
    """Seconds of the epoch, layout included, and events that it gave."""
    torch.set_num_threads(1)
    loader = BatchLoader(
        SequenceDataset.open(path), LoaderConfig(split=Split.TRAIN, global_batch_size=128, max_length=4096)
    )
    start = time.perf_counter()
    events = sum(batch.num_tokens for batch in loader.epoch(0))
    return f"{time.perf_counter() - start} {events}\n"


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1]))
