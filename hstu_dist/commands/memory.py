"""Running out of memory as an error that says what to change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from hstu_dist.distributed.process_group import World
from hstu_dist.errors import UserError

_EXHAUSTED = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
"""How CUDA and torch's allocators word it; outside CUDA the exception is a plain RuntimeError."""


@contextmanager
def explained_memory(world: World) -> Iterator[None]:
    """Turns a failed allocation into one line.

    Raises:
        UserError: names the rank, what it asked for, and the settings that need less.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not _EXHAUSTED.search(text):
            raise
        where = "GPU" if world.device.type == "cuda" else "host"
        wanted = re.search(r"[Tt]ried to allocate [\d.]+ ?\w+", text)
        detail = f" ({wanted[0].lower()})" if wanted else ""
        raise UserError(
            f"rank {world.rank} ran out of {where} memory{detail}",
            "lower trainer.global_batch_size, data.max_length or model.width, or use more ranks with "
            "embedding=row_wise; `python -m hstu_dist plan` counts what a rank needs",
        ) from error
