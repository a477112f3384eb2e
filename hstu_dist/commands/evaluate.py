"""`evaluate`: metrics of a run's best checkpoint on a split, without training."""

from __future__ import annotations

from collections.abc import Callable

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.commands.sessions import open_session
from hstu_dist.config import RunConfig
from hstu_dist.data.split import Split
from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.distributed.process_group import claim_machine, claim_precision, process_group
from hstu_dist.errors import UserError
from hstu_dist.preflight import preflight
from hstu_dist.run_folder import RunFolder
from hstu_dist.train.state import TrainState


def evaluate_run(config: RunConfig, split: Split, say: Callable[[str], None]) -> None:
    """Loads the best checkpoint of a run, or the newest if none was validated, and prints its metrics.

    Raises:
        UserError: the run has no checkpoint, or was trained on the events that it should rank.
    """
    if isinstance(config.data, StreamConfig):
        raise UserError(
            f"run {config.run_dir}: trains on a stream, which has no {split} split",
            "its figures of every window are in metrics.jsonl and result.json of the run folder",
        )
    if split is Split.VALIDATION and not config.trainer.validates:
        raise UserError(f"run {config.run_dir}: was trained on the validation events", "evaluate it with --split test")
    with process_group(config.trainer.device, config.trainer.timeout_seconds) as world:
        preflight(config, world.size, trains=False, device_type=world.device.type)
        claim_machine(config.trainer.threads, world)
        claim_precision(config.trainer.precision, world.device)
        checkpoints = CheckpointManager(RunFolder(config.run_dir).checkpoints, config.trainer.checkpoint.keep)
        session = open_session(config, world)
        loaded = checkpoints.load_newest(session.tensors(), set_aside=False)
        if loaded is None:
            raise UserError(f"run {config.run_dir}: got no checkpoint", "train it first with the same settings")
        state = TrainState()
        state.load_state_dict(loaded)
        best = state.best_step if checkpoints.holds(state.best_step) else state.step
        if best != state.step:
            checkpoints.load(best, session.tensors())
        values = session.evaluate(split)
        if world.is_main:
            say(f"run {config.run_dir}, step {best}, {split} split:")
            for name, value in values.items():
                say(f"{name:>16} {value:.4f}")
