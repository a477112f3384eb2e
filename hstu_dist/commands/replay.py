"""`replay`: a refused step once more, on one process, to see which part of the model first leaves the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.commands.session import ModelSession, build_model
from hstu_dist.commands.sessions import open_session
from hstu_dist.config import RunConfig, load
from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.distributed.config import ParallelConfig
from hstu_dist.distributed.process_group import claim_machine, process_group
from hstu_dist.errors import UserError
from hstu_dist.run_folder import RunFolder
from hstu_dist.train.guard import RefusedStep, read_refused
from hstu_dist.train.step import TrainStep


@dataclass(frozen=True)
class Weights:
    """What a replay computes with: `step` of its checkpoint, or None for those that the run began with."""

    step: int | None

    def describe(self, refused: int) -> str:
        """In words, seen from the refused step."""
        if self.step is None:
            return "the weights that the run began with"
        # a checkpoint that was written when the run was ended counts the refused steps, which changed nothing
        steps = max(0, refused - self.step)
        return f"the checkpoint of step {self.step}" + (f", {steps} steps before" if steps else "")


def replay(folder: Path, say: Callable[[str], None]) -> None:
    """Computes loss and gradients of a refused step again and says where they are not finite.

    Args:
        folder: RUN/replay/step-NNNNNNNN.
        say: prints a line.

    Raises:
        UserError: the folder holds no refused step, or its run is gone.
    """
    files = sorted(folder.glob("rank-*.pt"))
    if not files:
        raise UserError(f"{folder}: holds no refused step", "give a folder RUN/replay/step-NNNNNNNN")
    refused = [read_refused(file) for file in files]
    run = RunFolder(folder.absolute().parents[1])
    config = _alone(load(run.config_file))
    with process_group(config.trainer.device, config.trainer.timeout_seconds) as world:
        claim_machine(config.trainer.threads, world)
        if isinstance(config.data, StreamConfig):
            session = build_model(config, world, config.data.num_items)
        else:
            session = open_session(config, world)
        weights = _restore(session, run, refused[0].step)
        say(f"step {refused[0].step}: {refused[0].refusal.reason}; with {weights.describe(refused[0].step)}:")
        step = TrainStep(session.objective(), session.optimizers, world)
        for file, share in zip(files, refused, strict=True):
            say(f"{file.stem}: {examine(session, step, share)}")


def _alone(config: RunConfig) -> RunConfig:
    """The run without what takes several ranks."""
    embedding = replace(config.embedding, replicas=1, plan=None)
    trainer = replace(config.trainer, parallel=ParallelConfig())
    return replace(config, embedding=embedding, trainer=trainer)


def _restore(session: ModelSession, run: RunFolder, step: int) -> Weights:
    """Loads the newest checkpoint of the time before the step, or the one that was written for it."""
    # one that ended the run counts refused steps, which changed nothing: they are those that were kept
    last = step
    while (run.replay / f"step-{last:08d}").is_dir():
        last += 1
    checkpoints = CheckpointManager(run.checkpoints, session.config.trainer.checkpoint.keep)
    known = [s for s in checkpoints.steps() if s <= last]
    if not known:
        return Weights(None)
    checkpoints.load(known[-1], session.tensors())
    return Weights(known[-1])


def examine(session: ModelSession, step: TrainStep, share: RefusedStep) -> str:
    """One line: loss, the first module with an output that is not finite, parameters with such a gradient."""
    batch = share.refusal.batch.to(session.world.device)
    tower = session.recommender.tower
    session.optimizers.dense.zero_grad()
    with _first_not_finite(tower) as found:
        gradient = step.gradient(batch, share.refusal.work, share.step)
    wrong = [name for name, p in tower.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    rows = gradient.rows_UD
    table = [] if rows.isfinite().all() else ["rows of the item table are not finite"]
    if rows.grad is not None and not rows.grad.isfinite().all():
        wrong.append("item table")
    parts = [
        f"{batch.num_sequences} sequences, loss {gradient.loss_sum:.6g}",
        *table,
        *(f"first output that is not finite: {name}" for name in found[:1]),
        f"gradients that are not finite: {', '.join(wrong)}" if wrong else "all gradients are finite",
    ]
    return "; ".join(parts)


@contextmanager
def _first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose output is not finite, in the order in which they ran."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not bool(torch.isfinite(output).all()):
            found.append(name or "the whole tower")

    handles = [
        module.register_forward_hook(lambda _module, _input, output, name=name: look(name, output))
        for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
