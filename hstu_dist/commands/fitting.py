"""The middle of `train`, the same for prepared data and streams: from a checkpoint to the end of the loop."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.commands.session import ModelSession
from hstu_dist.config import to_dict
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.plugins import PluginConfig, find
from hstu_dist.run_folder import RunFolder
from hstu_dist.train.guard import GuardHook
from hstu_dist.train.hooks import AverageHook, AverageReplicasHook, CheckpointHook, LogHook
from hstu_dist.train.metrics_log import MetricsLog
from hstu_dist.train.profile import ProfileHook
from hstu_dist.train.ranks import HeartbeatHook, StragglerHook
from hstu_dist.train.sequence_log import SequenceLog, Step
from hstu_dist.train.state import TrainState
from hstu_dist.train.step import TrainStep
from hstu_dist.train.throughput import job_peak_flops
from hstu_dist.train.trainer import Hook, Loader, Trainer
from hstu_dist.train.vocabulary_log import VocabularyHook

logger = logging.getLogger(__name__)


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
        settings, world = self.session.config.trainer, self.session.world
        with contextlib.ExitStack() as stack:
            # one rank looks for the file; the ranks agree before each step
            stop_requested = stack.enter_context(stop_requests(self.folder.stop_file if world.is_main else None))
            stack.callback(self.checkpoints.close)
            log = self._log(stack) if world.is_main else None
            trainer = Trainer(
                step=self._step(stack),
                loader=loader,
                state=self.state,
                epochs=settings.epochs,
                stop_epoch=settings.stop_epoch,
                world=world,
                workload=self.session.workload,
                peak_flops=job_peak_flops(settings.peak_flops, settings.precision, world),
                hooks=[*self._hooks(log, evaluation(log)), *last],
                stop_requested=stop_requested,
            )
            trainer.fit()
        if world.is_main and settings.profile.first_step is not None:
            _draw_profile(self.folder)
        return trainer

    def _hooks(self, log: MetricsLog | None, evaluation: Iterable[Hook]) -> list[Hook]:
        """In the order of their turns: what refuses a step first, what saves it last."""
        session, settings = self.session, self.session.config.trainer
        checkpoint = CheckpointHook(settings.checkpoint, self.checkpoints, session.saved_tensors)
        return [
            HeartbeatHook(),
            GuardHook(settings.guard, self.folder.replay, checkpoint.on_stop),
            LogHook(settings.logging, log, session.training_flops),
            *_vocabulary_hooks(session, log),
            *([] if session.average is None else [AverageHook(session.average)]),
            *_replica_hooks(session),
            StragglerHook(settings.logging.every_steps, settings.guard.slow_ratio, log),
            ProfileHook(settings.profile, self.folder.path),
            *evaluation,
            *(_own_hook(hook, session, log) for hook in settings.hooks),
            checkpoint,
        ]

    def _log(self, stack: contextlib.ExitStack) -> MetricsLog:
        """Where metrics go, until `stack` is left."""
        config = self.session.config
        log = MetricsLog(self.folder.path, config.trainer.logging, to_dict(config), self.state.step)
        return stack.enter_context(log)

    def _step(self, stack: contextlib.ExitStack) -> Step:
        """What trains on a batch, until `stack` is left."""
        session, config = self.session, self.session.config
        step: Step = TrainStep(session.objective(), session.optimizers, session.world, config.trainer.micro_batches)
        if config.trainer.logging.sequences:
            log = SequenceLog(step, self.folder.sequences, session.world, self.state.step)
            step = stack.enter_context(contextlib.closing(log))
        return step

    def stopped(self, say: Callable[[str], None]) -> ExitCode:
        """Says on rank 0 that the run was asked to stop, and how its process ends."""
        by_file = self.folder.stop_file.exists()
        if self.session.world.is_main:
            by = f" by {self.folder.stop_file}" if by_file else ""
            say(f"stopped at step {self.state.step}{by}; the same command continues")
        return ExitCode.FINISHED if by_file else ExitCode.STOPPED


def restore(session: ModelSession, checkpoints: CheckpointManager) -> TrainState:
    """State of the newest whole checkpoint, its tensors loaded; a fresh state where there is none."""
    state = TrainState()
    values = checkpoints.load_newest(session.tensors())
    if values is not None:
        state.load_state_dict(values)
    state.tables = {name: spec.describe() for name, spec in session.recommender.tables.specs.items()}
    return state


class HookFactory(Protocol):
    """What the target of a hook in `trainer.hooks` is; the hook's settings come as keywords."""

    def __call__(self, session: ModelSession, log: MetricsLog | None, **settings: object) -> Hook:
        """The hook, on every rank; only the main rank has a log to write to."""


def _own_hook(config: PluginConfig, session: ModelSession, log: MetricsLog | None) -> Hook:
    """A hook of the user's own.

    Raises:
        UserError: it cannot be imported, does not take its settings, or is no hook.
    """
    factory: HookFactory = find(config.target)
    try:
        hook = factory(session, log, **config.settings)
    except TypeError as error:
        raise UserError(f"{config.target}: {error}", "give the keys that it expects as its settings") from error
    if not isinstance(hook, Hook):
        raise UserError(f"{config.target}: gave {type(hook).__name__}", "let it give a hstu_dist.train.trainer.Hook")
    return hook


def _replica_hooks(session: ModelSession) -> Iterator[Hook]:
    settings = session.config.embedding
    if settings.replicas > 1:
        yield AverageReplicasHook(settings.sync_steps, session.average_replicas)


def _vocabulary_hooks(session: ModelSession, log: MetricsLog | None) -> Iterator[Hook]:
    tables = session.recommender.tables
    if tables.vocabularies:
        yield VocabularyHook(session.config.trainer.logging.every_steps, tables, log)


def _draw_profile(folder: RunFolder) -> None:
    """A picture of the traced steps beside their trace; a run that trained all the same does not fail for it."""
    try:
        # matplotlib takes half a second to import
        from hstu_dist.report.flame import write_flame

        logger.info("picture of a step written to %s", write_flame(folder.path)[1])
    except UserError as error:
        logger.warning("no picture of a step: %s", error)


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
