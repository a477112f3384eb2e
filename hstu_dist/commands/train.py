"""`train`: one rank of a run, from settings to the result table."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.commands.embedding_table import embedding_table
from hstu_dist.commands.memory import explained_memory
from hstu_dist.commands.rank_log import rank_log
from hstu_dist.commands.result_table import finished_report, result_table
from hstu_dist.commands.session import Session
from hstu_dist.commands.sessions import open_session
from hstu_dist.config import RunConfig, to_dict
from hstu_dist.data.split import Split
from hstu_dist.distributed.agreement import check_machines_agree
from hstu_dist.distributed.process_group import World, claim_machine, claim_precision, process_group
from hstu_dist.distributed.table_plan import PLAN_FILE
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.preflight import preflight
from hstu_dist.run_folder import RunFolder
from hstu_dist.train.guard import GuardHook
from hstu_dist.train.hooks import AverageHook, CheckpointHook, EvaluateHook, LogHook, ProfileHook, TrackTestHook
from hstu_dist.train.metrics_log import MetricsLog
from hstu_dist.train.ranks import HeartbeatHook, StragglerHook
from hstu_dist.train.sequence_log import SequenceLog, Step
from hstu_dist.train.state import TrainState
from hstu_dist.train.step import TrainStep
from hstu_dist.train.throughput import job_peak_flops, training_averages
from hstu_dist.train.trainer import Hook, Trainer

logger = logging.getLogger(__name__)


def train(config: RunConfig, say: Callable[[str], None]) -> ExitCode:
    """Trains or continues a run, then tests its best epoch. Every rank calls it.

    Args:
        config: the run.
        say: prints a line for the user; called on rank 0 only.

    Returns:
        FINISHED, also for a run that the file `stop` ended early; STOPPED if a signal to any rank did.

    Raises:
        UserError: the run cannot start or go on.
    """
    folder = RunFolder(config.run_dir)
    with process_group(config.trainer.device, config.trainer.timeout_seconds) as world:
        preflight(config, world.size)
        check_machines_agree(world, folder.path)
        result = folder.finished(config.trainer.last_epoch)
        if result is not None:
            if world.is_main:
                say(finished_report(config, result))
            return ExitCode.FINISHED
        claim_machine(config.trainer.threads, world)
        claim_precision(config.trainer.precision, world.device)
        with _locked(folder, world), rank_log(folder.logs / "ranks", world), explained_memory(world):
            return _run(config, world, folder, say)


@contextlib.contextmanager
def _locked(folder: RunFolder, world: World) -> Iterator[None]:
    """Rank 0 holds the folder's lock; if another run has it, every rank hears so at once."""
    with contextlib.ExitStack() as stack:
        refusal: list[UserError | None] = [None]
        if world.is_main:
            try:
                stack.enter_context(folder.lock())
            except UserError as error:
                refusal = [error]
        dist.broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise refusal[0]
        yield


def _run(config: RunConfig, world: World, folder: RunFolder, say: Callable[[str], None]) -> ExitCode:
    session = open_session(config, world)
    settings = config.trainer.checkpoint
    checkpoints = CheckpointManager(folder.checkpoints, settings.keep, settings.asynchronous)
    state = restore(session, checkpoints)
    if world.is_main:
        _announce(session, state, say)
        folder.describe(config)
        session.recommender.tables.plan.save(folder.path / PLAN_FILE)
    if not _fit(session, checkpoints, state, folder):
        if world.is_main:
            by = f" by {folder.stop_file}" if folder.stop_file.exists() else ""
            say(f"stopped at step {state.step}{by}; the same command continues")
        return ExitCode.FINISHED if folder.stop_file.exists() else ExitCode.STOPPED
    result = _test(session, checkpoints, state)
    if world.is_main:
        folder.finish(result)
        say(result_table(config, result))
    return ExitCode.FINISHED


def restore(session: Session, checkpoints: CheckpointManager) -> TrainState:
    """State of the newest whole checkpoint, its tensors loaded; a fresh state where there is none."""
    state = TrainState()
    values = checkpoints.load_newest(session.tensors())
    if values is not None:
        state.load_state_dict(values)
    state.tables = {name: spec.describe() for name, spec in session.recommender.tables.specs.items()}
    return state


def _announce(session: Session, state: TrainState, say: Callable[[str], None]) -> None:
    config, manifest = session.config, session.dataset.manifest
    say(
        f"run {config.run_dir}: {manifest.name}, {manifest.num_users} users, {manifest.num_items} items, "
        f"{manifest.num_events} events, {session.world.size} ranks"
    )
    tables = session.recommender.tables
    say(embedding_table(tables.specs, tables.plan))
    if state.step:
        say(f"continuing at epoch {state.epoch}, step {state.step}")


def _fit(session: Session, checkpoints: CheckpointManager, state: TrainState, folder: RunFolder) -> bool:
    """Trains to the end; False if somebody asked to stop."""
    config, world = session.config, session.world
    step: Step = TrainStep(session.objective(), session.optimizers, world, config.trainer.micro_batches)
    with contextlib.ExitStack() as stack:
        if config.trainer.logging.sequences:
            step = stack.enter_context(contextlib.closing(SequenceLog(step, folder.sequences, world, state.step)))
        # one rank looks for the file; the ranks agree before each step
        stop_requested = stack.enter_context(stop_requests(folder.stop_file if world.is_main else None))
        stack.callback(checkpoints.close)
        log = None
        checkpoint = CheckpointHook(config.trainer.checkpoint, checkpoints, session.tensors)
        if world.is_main:
            log = stack.enter_context(MetricsLog(folder.path, config.trainer.logging, to_dict(config), state.step))
        trainer = Trainer(
            step=step,
            loader=session.loader(session.training_split),
            state=state,
            epochs=config.trainer.epochs,
            stop_epoch=config.trainer.stop_epoch,
            world=world,
            workload=session.workload,
            peak_flops=job_peak_flops(config.trainer.peak_flops, config.trainer.precision, world),
            hooks=[
                HeartbeatHook(),
                GuardHook(config.trainer.guard, folder.replay, checkpoint.on_stop),
                LogHook(config.trainer.logging, log, session.training_flops),
                *([] if session.average is None else [AverageHook(session.average)]),
                StragglerHook(config.trainer.logging.every_steps, config.trainer.guard.slow_ratio, log),
                ProfileHook(config.trainer.profile, folder.path),
                *_evaluation_hooks(session, log),
                checkpoint,
            ],
            stop_requested=stop_requested,
        )
        trainer.fit()
    return not trainer.interrupted


def _evaluation_hooks(session: Session, log: MetricsLog | None) -> Iterator[Hook]:
    settings = session.config.trainer
    if settings.validates:
        yield EvaluateHook(settings.evaluation, lambda: session.evaluate(Split.VALIDATION), log)
    if settings.evaluation.track_test:
        yield TrackTestHook(settings.evaluation, lambda: session.evaluate(Split.TEST), log)


def _test(session: Session, checkpoints: CheckpointManager, state: TrainState) -> dict[str, Any]:
    """Test metrics of the best validated epoch, or of the last one of a refit, read once; popularity beside them."""
    trainer = session.config.trainer
    result: dict[str, Any] = {
        "train_on": trainer.train_on,
        "epochs": state.epoch,
        "steps": state.step,
        "refused_steps": state.refused_steps,
        "stopped_early": state.stopped_early,
    }
    if trainer.validates:
        checkpoints.load(state.best_step, session.tensors())
        result |= {"best_epoch": state.best_epoch, "validation": {trainer.evaluation.monitor: state.best_value}}
    result |= {
        "test": session.evaluate(Split.TEST),
        "popularity": session.evaluate_popularity(Split.TEST),
        "world_size": session.world.size,
        "dense_parameters": sum(parameter.numel() for parameter in session.recommender.tower.parameters()),
        "speed": training_averages(state, session.training_flops),
    }
    # empty if no reading was a number
    if state.best_test:
        result["reference_protocol"] = {"best_epoch": state.best_test_epoch, "test": state.best_test}
    return result


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
