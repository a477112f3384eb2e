"""The middle of `train`, the same for prepared data and streams: from a checkpoint to the end of the loop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.commands.session import ModelSession
from hstu_dist.config import to_dict
from hstu_dist.run_folder import RunFolder
from hstu_dist.train.hooks import AverageHook, CheckpointHook, LogHook, ProfileHook
from hstu_dist.train.metrics_log import MetricsLog
from hstu_dist.train.state import TrainState
from hstu_dist.train.step import TrainStep
from hstu_dist.train.throughput import job_peak_flops
from hstu_dist.train.trainer import Hook, Loader, Trainer


@dataclass(frozen=True)
class Run:
    """A model and where its training is.

    Attributes:
        session: the model.
        folder: of the run.
        checkpoints: in that folder.
        state: of the newest whole checkpoint, which the model has been loaded from, or of a run that begins.
    """

    session: ModelSession
    folder: RunFolder
    checkpoints: CheckpointManager
    state: TrainState

    @classmethod
    def restored(cls, session: ModelSession, folder: RunFolder) -> Run:
        """Goes on where the folder's newest whole checkpoint is."""
        settings = session.config.trainer.checkpoint
        checkpoints = CheckpointManager(folder.checkpoints, settings.keep, settings.asynchronous)
        return cls(session, folder, checkpoints, restore(session, checkpoints))

    def fit(
        self, loader: Loader, evaluation: Callable[[MetricsLog | None], Iterable[Hook]], last: Sequence[Hook] = ()
    ) -> Trainer:
        """Trains to the end of the data or until somebody asks to stop.

        Args:
            loader: this rank's batches.
            evaluation: hooks that come before the one that saves; they write to the log, if this rank has one.
            last: hooks that come after it.

        Returns:
            The trainer, which knows how it ended.
        """
        session, config, world = self.session, self.session.config, self.session.world
        with contextlib.ExitStack() as stack:
            # one rank looks for the file; the ranks agree before each step
            stop_requested = stack.enter_context(stop_requests(self.folder.stop_file if world.is_main else None))
            stack.callback(self.checkpoints.close)
            log = None
            if world.is_main:
                path, resume_step = self.folder.path, self.state.step
                log = stack.enter_context(MetricsLog(path, config.trainer.logging, to_dict(config), resume_step))
            trainer = Trainer(
                step=TrainStep(session.objective(), session.optimizers, world, config.trainer.micro_batches),
                loader=loader,
                state=self.state,
                epochs=config.trainer.epochs,
                stop_epoch=config.trainer.stop_epoch,
                world=world,
                workload=session.workload,
                peak_flops=job_peak_flops(config.trainer.peak_flops, config.trainer.precision, world),
                hooks=[
                    LogHook(config.trainer.logging, log, session.training_flops),
                    *([] if session.average is None else [AverageHook(session.average)]),
                    ProfileHook(config.trainer.profile, self.folder.path),
                    *evaluation(log),
                    CheckpointHook(config.trainer.checkpoint, self.checkpoints, session.tensors),
                    *last,
                ],
                stop_requested=stop_requested,
            )
            trainer.fit()
        return trainer

    def stopped(self) -> str:
        """What to say of a run that was asked to stop."""
        by = f" by {self.folder.stop_file}" if self.folder.stop_file.exists() else ""
        return f"stopped at step {self.state.step}{by}; the same command continues"


def restore(session: ModelSession, checkpoints: CheckpointManager) -> TrainState:
    """State of the newest whole checkpoint, its tensors loaded; a fresh state where there is none."""
    state = TrainState()
    values = checkpoints.load_newest(session.tensors())
    if values is not None:
        state.load_state_dict(values)
    state.tables = {name: spec.describe() for name, spec in session.recommender.tables.specs.items()}
    return state


@contextlib.contextmanager
def stop_requests(file: Path | None) -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM, SIGINT and the appearance of a file into a question that the loop asks before each step."""
    received: list[int] = []

    def remember(number: int, _frame: Any) -> None:
        received.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received) or (file is not None and file.exists())
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
