"""Steps with a loss or gradient that is not finite: their batches are kept for `replay`, and too many end the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from pickle import UnpicklingError

import torch

from hstu_dist.batch import JaggedBatch
from hstu_dist.errors import UserError
from hstu_dist.files import replacing
from hstu_dist.models.flops import Workload
from hstu_dist.train.config import GuardConfig
from hstu_dist.train.step import Refusal, StepResult
from hstu_dist.train.trainer import Hook, Trainer

logger = logging.getLogger(__name__)


class GuardHook(Hook):
    """Counts refused steps; must come before the hook that saves checkpoints, which hold the count."""

    def __init__(self, config: GuardConfig, folder: Path, save: Callable[[Trainer], None]) -> None:
        """Keeps batches in `folder`; `save` writes a checkpoint before the run is ended."""
        self.config = config
        self.folder = folder
        self.save = save
        self._in_a_row = 0

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Keeps the batch of a refused step.

        Raises:
            UserError: too many in a row.
        """
        if result.refusal is None:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        trainer.state.refused_steps += 1
        step = trainer.state.step - 1
        folder = self.folder / f"step-{step:08d}"
        try:
            write_refused(folder / f"rank-{trainer.world.rank}.pt", RefusedStep(step, result.refusal))
        except OSError as error:
            logger.warning("the batch of step %d cannot be kept (%s)", step, error.strerror or error)
        if trainer.world.is_main:
            logger.warning("step %d: %s; no rank updated anything, see %s", step, result.refusal.reason, folder)
        if self._in_a_row >= self.config.max_refused:
            self.save(trainer)
            raise UserError(
                f"step {step}: {result.refusal.reason}, {self._in_a_row} steps in a row",
                f"see where with `python -m hstu_dist replay {folder}`; lower the learning rates or set "
                "optimizer.clip_norm under a new name, or give the same command again to leave these steps out",
            )


@dataclass(frozen=True)
class RefusedStep:
    """One rank's share of a step that was not taken.

    Attributes:
        step: steps taken before it.
        refusal: the batch and why.
    """

    step: int
    refusal: Refusal


def write_refused(path: Path, refused: RefusedStep) -> None:
    """Writes a file that `read_refused` and `torch.load(weights_only=True)` read."""
    refusal = refused.refusal
    batch = {field.name: getattr(refusal.batch, field.name) for field in fields(JaggedBatch)}
    batch = {name: None if tensor is None else tensor.cpu() for name, tensor in batch.items()}
    values = {"step": refused.step, "reason": refusal.reason, "work": asdict(refusal.work), "batch": batch}
    with replacing(path) as file:
        torch.save(values, file)


def read_refused(path: Path) -> RefusedStep:
    """What `write_refused` wrote.

    Raises:
        UserError: the file is something else.
    """
    try:
        values = torch.load(path, weights_only=True)
        refusal = Refusal(JaggedBatch(**values["batch"]), Workload(**values["work"]), values["reason"])
        return RefusedStep(values["step"], refusal)
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, UnpicklingError) as error:
        raise UserError(f"{path}: holds no refused step", "give a folder RUN/replay/step-NNNNNNNN") from error
