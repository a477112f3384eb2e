"""A group of ranks, of which rank 1 is killed after it has joined, once."""

from __future__ import annotations

import os
import signal
import sys

import torch

from hstu_dist.distributed.process_group import process_group, sum_over_ranks
from hstu_dist.errors import PeerLostError


def main() -> int:
    try:
        with process_group("cpu", timeout_seconds=60) as world:
            total = sum_over_ranks(torch.ones(1))
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            total = sum_over_ranks(total)
            sys.stdout.write(f"rank {world.rank}: {total.item():.0f}\n")
    except PeerLostError:
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
