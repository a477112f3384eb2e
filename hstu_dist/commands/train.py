"""`train`: one rank of a run, from settings to the result table."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch.distributed as dist

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.commands.embedding_table import embedding_table
from hstu_dist.commands.fitting import Run
from hstu_dist.commands.memory import explained_memory
from hstu_dist.commands.rank_log import rank_log
from hstu_dist.commands.report import leave_report
from hstu_dist.commands.result_table import finished_report, result_table
from hstu_dist.commands.session import Session
from hstu_dist.commands.sessions import open_session
from hstu_dist.commands.stream import train_stream
from hstu_dist.config import RunConfig
from hstu_dist.data.split import Split
from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.distributed.agreement import check_machines_agree
from hstu_dist.distributed.process_group import World, claim_machine, claim_precision, process_group
from hstu_dist.distributed.table_plan import PLAN_FILE
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.preflight import preflight
from hstu_dist.run_folder import RunFolder
from hstu_dist.train.hooks import EvaluateHook, TrackTestHook
from hstu_dist.train.metrics_log import MetricsLog
from hstu_dist.train.state import TrainState
from hstu_dist.train.throughput import training_averages
from hstu_dist.train.trainer import Hook

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
        preflight(config, world.size, device_type=world.device.type)
        check_machines_agree(world, folder.path)
        result = folder.finished(config.trainer.last_epoch)
        if result is not None:
            if world.is_main:
                say(finished_report(config, result))
            return ExitCode.FINISHED
        claim_machine(config.trainer.threads, world)
        claim_precision(config.trainer.precision, world.device)
        with _locked(folder, world), rank_log(folder.logs / "ranks", world), explained_memory(world):
            run = train_stream if isinstance(config.data, StreamConfig) else _run
            code = run(config, world, folder, say)
            if world.is_main and config.trainer.logging.report:
                leave_report(folder.path, say)
            return code


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
    run = Run.restored(session, folder)
    if world.is_main:
        _announce(session, run.state, say)
        known = folder.data()
        # a run that left no record goes on without one: nobody knows what its first steps saw
        recorded = known is not None or run.state.step == 0
        folder.describe(config, session.data_identity(known) if recorded else None)
        session.recommender.tables.plan.save(folder.path / PLAN_FILE)
    trainer = run.fit(session.loader(session.training_split), partial(_evaluation_hooks, session))
    if trainer.interrupted:
        return run.stopped(say)
    result = _test(session, run.checkpoints, run.state)
    if world.is_main:
        folder.finish(result)
        say(result_table(config, result))
    return ExitCode.FINISHED


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
        result |= _load_best(session, checkpoints, state)
    result |= {
        "test": session.evaluate(Split.TEST),
        "popularity": session.evaluate_popularity(Split.TEST),
        "world_size": session.world.size,
        "dense_parameters": session.dense_parameters,
        "speed": training_averages(state, session.training_flops),
    }
    # empty if no reading was a number
    if state.best_test:
        result["reference_protocol"] = {"best_epoch": state.best_test_epoch, "test": state.best_test}
    return result


def _load_best(session: Session, checkpoints: CheckpointManager, state: TrainState) -> dict[str, Any]:
    """Loads the best validated epoch, or the newest that there is: a full disk can have refused the best one."""
    monitor = session.config.trainer.evaluation.monitor
    if checkpoints.holds(state.best_step):
        checkpoints.load(state.best_step, session.tensors())
        return {"best_epoch": state.best_epoch, "validation": {monitor: state.best_value}}
    newest = TrainState()
    # without any checkpoint, the weights in hand
    newest.load_state_dict(checkpoints.load_newest(session.tensors()) or state.state_dict())
    if session.world.is_main:
        why = f"epoch {state.best_epoch}, the best, has no checkpoint" if state.best_epoch else "no epoch was validated"
        logger.warning("%s; what is tested is epoch %d, the newest one", why, newest.epoch)
    return {"best_epoch": newest.epoch, "validation": {monitor: session.evaluate(Split.VALIDATION)[monitor]}}
