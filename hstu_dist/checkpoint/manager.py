"""Which checkpoints exist: committed by one rename, oldest removed, the best one kept."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hstu_dist.checkpoint.storage import read_state, read_tensors, write_state, write_tensors
from hstu_dist.files import sync

_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = ".unfinished"

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Checkpoints `step-NNNNNNNN` of one run folder. All ranks call every method together.

    A checkpoint is written under another name and renamed when every rank has finished and the bytes are on
    disk: a folder named `step-...` is always whole.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def save(self, tensors: dict[str, Any], state: dict[str, Any], best_step: int) -> None:
        """Writes the checkpoint of `state["step"]`, then removes what is no longer kept.

        Args:
            tensors: flat dictionary of plain and sharded tensors.
            state: plain values, equal on all ranks.
            best_step: this checkpoint is kept however old it gets; -1: none.
        """
        final = self.path(int(state["step"]))
        unfinished = final.with_name(final.name + _UNFINISHED)
        main = dist.get_rank() == 0
        if main:
            self._remove_leftovers()
            unfinished.mkdir(parents=True)
        dist.barrier()
        write_tensors(unfinished, tensors)
        if main:
            write_state(unfinished, state)
            _sync(unfinished)
            if final.exists():
                shutil.rmtree(final)
            unfinished.rename(final)
            sync(self.folder)
            self._retain(best_step)
        dist.barrier()

    def load(self, step: int, tensors: dict[str, Any]) -> dict[str, Any]:
        """Fills `tensors` from a step's checkpoint and returns its plain values.

        Raises:
            UserError: it is damaged or does not fit.
        """
        folder = self.path(step)
        state = read_state(folder)
        read_tensors(folder, tensors)
        return state

    def _remove_leftovers(self) -> None:
        for leftover in self.folder.glob(f"step-*{_UNFINISHED}"):
            logger.info("removing %s, which an interrupted run left unfinished", leftover)
            shutil.rmtree(leftover)

    def _retain(self, best_step: int) -> None:
        steps = self.steps()
        for step in steps[: -self.keep]:
            if step != best_step:
                shutil.rmtree(self.path(step))


def _sync(folder: Path) -> None:
    """Puts a folder and all that is below it on disk, so that a rename cannot outlive the files it names."""
    for path in [folder, *folder.rglob("*")]:
        sync(path)
