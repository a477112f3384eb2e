"""Which checkpoints exist: committed by one rename, oldest removed, the best one kept, damaged ones passed over."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from hstu_dist.checkpoint.background import Background, HostCopies
from hstu_dist.checkpoint.manifest import (
    DamagedCheckpointError,
    Manifest,
    check_file,
    read_manifest,
    step_of,
)
from hstu_dist.checkpoint.storage import NotWrittenError, Source, read_tensors, write_tensors
from hstu_dist.errors import UserError
from hstu_dist.files import sync

_UNFINISHED = ".unfinished"
_DAMAGED = ".damaged"
_CLOSE_SECONDS = 10.0

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointManager:
    """Checkpoints `step-NNNNNNNN` of one run folder. All ranks call every method together.

    A checkpoint is written under another name and renamed when every rank has finished and the bytes are on
    disk: a folder named `step-...` was whole once, and its checksums tell whether it still is.

    Attributes:
        saved_step: step of the newest checkpoint that this process has finished; -1: none.
    """

    def __init__(self, folder: Path, keep: int, asynchronous: bool = False) -> None:
        """Keeps the newest `keep`; `asynchronous`: `save` returns as soon as it has copied the tensors."""
        self.folder = folder
        self.keep = keep
        self.saved_step = -1
        self._copies = HostCopies() if asynchronous else None
        self._background = Background()
        self._removal = Background()
        # collectives of a thread must not mix with those of the training
        self._group = dist.new_group(backend="gloo") if asynchronous else None

    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(step for entry in self.folder.iterdir() if (step := step_of(entry)) is not None)

    def holds(self, step: int) -> bool:
        """Whether there is a checkpoint of a step, as rank 0 sees it."""
        return self._on_main(lambda: step in self.steps())

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def save(self, tensors: dict[str, Any], state: dict[str, Any], best_step: int) -> None:
        """Writes the checkpoint of `state["step"]`, then removes what is no longer kept.

        If the system refuses to write, a log line says so and all older checkpoints stay: training can go on.
        At most one save is in flight: a second one first waits for it.

        Args:
            tensors: flat dictionary of plain and sharded tensors.
            state: plain values, equal on all ranks.
            best_step: this checkpoint is kept however old it gets; -1: none.
        """
        self.finish()
        if self._copies is None:
            self._save(Source(tensors, state), best_step)
        else:
            source = Source(tensors, state, self._copies.take(tensors))
            self._background.start(lambda: self._save(source, best_step))

    def finish(self) -> None:
        """Waits for a save in flight, and for the removal of older ones; raises what it raised."""
        self._background.wait()
        self._removal.wait()

    def close(self) -> None:
        """Gives a save in flight a moment to end; for a run that ends by an error of its own."""
        self._background.wait(_CLOSE_SECONDS)

    def load(self, step: int, tensors: dict[str, Any]) -> dict[str, Any]:
        """Fills `tensors` from a step's checkpoint and returns its plain values.

        Raises:
            DamagedCheckpointError: it is damaged; `tensors` are as before.
            UserError: it does not exist or does not fit.
        """
        folder = self.path(step)
        manifest = self._checked(folder)
        read_tensors(folder, manifest, tensors)
        return manifest.state

    def load_newest(self, tensors: dict[str, Any], set_aside: bool = True) -> dict[str, Any] | None:
        """Fills `tensors` from the newest whole checkpoint; None where there is no checkpoint at all.

        Args:
            tensors: as `save` was given them.
            set_aside: rename damaged ones that are newer, so that they cannot pass for checkpoints again.

        Raises:
            UserError: all are damaged, or the newest whole one does not fit.
        """
        damaged: list[DamagedCheckpointError] = []
        # one rank's list for all: another's may be older
        steps = self._on_main(self.steps)
        for step in reversed(steps):
            try:
                state = self.load(step, tensors)
            except DamagedCheckpointError as error:
                damaged.append(error)
                continue
            newer = [s for s in steps if s > step]
            if dist.get_rank() == 0:
                for passed_over in damaged:
                    logger.warning("%s; going on from step %d", passed_over.problem, step)
                for number in newer if set_aside else ():
                    _set_aside(self.path(number))
            return state
        if damaged:
            raise UserError(
                f"{damaged[0].problem}, and no other checkpoint is whole", "choose another run name to begin anew"
            )
        return None

    def _save(self, source: Source, best_step: int) -> None:
        step = int(source.state["step"])
        unfinished: Path | None = None
        try:
            unfinished = self._on_main(lambda: self._begin(step))
            write_tensors(unfinished, source, self._group)
            self._on_main(lambda: self._commit(unfinished, step, best_step))
        except NotWrittenError as error:
            if dist.get_rank() == 0:
                logger.warning(
                    "checkpoint of step %d is not written (%s); training goes on, older checkpoints stay", step, error
                )
            if unfinished is not None:
                self._on_main(lambda: shutil.rmtree(unfinished, ignore_errors=True))
            return
        self.saved_step = step

    def _on_main(self, action: Callable[[], T]) -> T:
        """What `action` gives on rank 0, on every rank.

        Raises:
            NotWrittenError: the system refused.
        """
        outcome: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                outcome[0] = action()
            except OSError as error:
                outcome[1] = error.strerror or str(error)
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        value, refusal = outcome
        if refusal is not None:
            raise NotWrittenError(refusal)
        result: T = value
        return result

    def _begin(self, step: int) -> Path:
        for leftover in self.folder.glob(f"step-*{_UNFINISHED}"):
            logger.info("removing %s, which an interrupted run left unfinished", leftover)
            shutil.rmtree(leftover)
        # a name that a rank of an earlier attempt, which nobody stopped, cannot write into
        unfinished = self.path(step).with_name(f"{self.path(step).name}.{uuid.uuid4().hex[:8]}{_UNFINISHED}")
        unfinished.mkdir(parents=True)
        return unfinished

    def _commit(self, unfinished: Path, step: int, best_step: int) -> None:
        final = self.path(step)
        # a rename must not outlive the entries that it names
        sync(unfinished)
        going = _put_away(final)
        unfinished.rename(final)
        sync(self.folder)
        for old in self.steps()[: -self.keep]:
            if old != best_step:
                going += _put_away(self.path(old))
        # a file system takes its time to free gigabytes: training need not wait for that
        self._removal.start(lambda: _erase(going))

    def _checked(self, folder: Path) -> Manifest:
        """The manifest of a checkpoint whose files are whole; the ranks share the reading and agree.

        Raises:
            UserError: the first failure of any rank, on all of them.
        """
        failure, manifest = None, None
        try:
            manifest = read_manifest(folder)
            for name in sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]:
                check_file(folder, name, manifest.files[name])
        except UserError as error:
            failure = error
        failures: list[UserError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        for first in failures:
            if first is not None:
                raise first
        assert manifest is not None
        return manifest


def _put_away(folder: Path) -> list[Path]:
    """Renames a folder that is to be removed, if there is one: no part of a checkpoint stays that looks whole."""
    if not folder.exists():
        return []
    going = folder.with_name(f"{folder.name}.old{_UNFINISHED}")
    folder.rename(going)
    return [going]


def _erase(folders: list[Path]) -> None:
    for folder in folders:
        # what stays behind is removed before the next save
        shutil.rmtree(folder, ignore_errors=True)


def _set_aside(folder: Path) -> None:
    aside = folder.with_name(folder.name + _DAMAGED)
    _erase(_put_away(aside))
    folder.rename(aside)
