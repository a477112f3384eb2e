"""What happens periodically: logging, validation with early stopping, checkpoints, a profile."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.distributed.process_group import max_over_ranks, sum_over_ranks
from hstu_dist.models.flops import Workload
from hstu_dist.train.average import WeightAverage
from hstu_dist.train.config import CheckpointConfig, EvaluationConfig, LoggingConfig
from hstu_dist.train.metrics_log import MetricsLog
from hstu_dist.train.step import StepResult
from hstu_dist.train.trainer import Hook, Trainer

logger = logging.getLogger(__name__)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory that this process ever had: allocated on a GPU, resident where it computes on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kibibytes on Linux, bytes on macOS
    return peak if sys.platform == "darwin" else peak * 1024


class LogHook(Hook):
    """Loss, throughput and memory every few steps; a progress bar on rank 0.

    Speeds leave evaluation out. FLOPs are those that the model needs, whatever its implementation computes.
    """

    def __init__(self, config: LoggingConfig, log: MetricsLog | None, flops: Callable[[Workload], int]) -> None:
        """Logs to `log`, if this rank does; `flops` gives the FLOPs that training on a batch needs."""
        self.config = config
        self.log = log
        self.flops = flops
        self._loss_sum = 0.0
        self._work = Workload()
        self._steps = 0
        self._seconds_before = 0.0
        self._bar: tqdm[Any] | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Starts the bar."""
        self._seconds_before = trainer.state.train_seconds
        if trainer.world.is_main and self.config.progress:
            state = trainer.state
            self._bar = tqdm(
                total=_steps_to_come(trainer),
                initial=state.step,
                unit="step",
                dynamic_ncols=True,
                # None: no bar where nobody watches, such as a log file
                disable=None,
            )

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Adds the step up and writes every few of them."""
        self._loss_sum += result.loss_sum
        self._work += result.work
        self._steps += 1
        if self._bar is not None:
            self._bar.update()
        # by the step number, so that a resumed run logs at the same steps
        if trainer.state.step % self.config.every_steps == 0:
            self._write(trainer, result)

    def on_stop(self, trainer: Trainer) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()

    def _write(self, trainer: Trainer, result: StepResult) -> None:
        device = trainer.world.device
        loss = sum_over_ranks(torch.tensor([self._loss_sum], dtype=torch.float64, device=device))
        peak = max_over_ranks(torch.tensor([peak_memory_bytes(device)], device=device))
        seconds = trainer.state.train_seconds - self._seconds_before
        flops_per_second = self.flops(self._work) / seconds
        values = {
            "train/learning_rate": result.learning_rate,
            "train/epoch": trainer.state.epoch + trainer.state.batch / len(trainer.loader),
            "speed/tokens_per_second": self._work.tokens / seconds,
            "speed/flops_per_second": flops_per_second,
            "speed/seconds_per_step": seconds / self._steps,
            # of the fullest rank: it is the one that runs out
            "memory/peak_gib_per_rank": float(peak) / 2**30,
        }
        shown = {"epoch": f"{values['train/epoch']:.2f}"}
        # refused steps train on nothing, and have no loss
        if self._work.targets:
            values["train/loss"] = float(loss) / self._work.targets
            shown = {"loss": f"{values['train/loss']:.4f}", **shown}
        if trainer.peak_flops is not None:
            values["speed/mfu"] = flops_per_second / trainer.peak_flops
            shown["mfu"] = f"{values['speed/mfu']:.1%}"
        if self.log is not None:
            self.log.write(trainer.state.step, values | _imbalance(trainer))
        if self._bar is not None:
            self._bar.set_postfix(shown)
        self._loss_sum, self._work, self._steps = 0.0, Workload(), 0
        self._seconds_before = trainer.state.train_seconds


def _steps_to_come(trainer: Trainer) -> int | None:
    """Steps at which the loop ends, if that is known."""
    if trainer.total_steps is None or trainer.epochs is None:
        return None
    return trainer.total_steps // trainer.epochs * int(trainer.last_epoch)


def _imbalance(trainer: Trainer) -> dict[str, float]:
    """Work of the busiest rank over the mean, minus 1, in the last step; `in_turns`: had nobody balanced it."""
    if trainer.world.size == 1:
        return {}
    found = trainer.loader.imbalance(trainer.state.epoch, trainer.state.batch - 1)
    return {"speed/imbalance": found.after, "speed/imbalance_in_turns": found.before}


class AverageHook(Hook):
    """Takes the weights of every step into their average."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Updates the average."""
        self.average.update(trainer.state.step)


class AverageReplicasHook(Hook):
    """Averages the sets of tables every few steps, and before an evaluation; must come before that in the hooks."""

    def __init__(self, every_steps: int, average: Callable[[], None]) -> None:
        self.every_steps = every_steps
        self.average = average

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Averages if it is time."""
        if trainer.state.step % self.every_steps == 0:
            self.average()

    def after_epoch(self, trainer: Trainer) -> None:
        """Averages."""
        self.average()


class EvaluateHook(Hook):
    """Validation after every few epochs; remembers the best and stops a run that no longer improves."""

    def __init__(
        self, config: EvaluationConfig, validate: Callable[[], dict[str, float]], log: MetricsLog | None
    ) -> None:
        self.config = config
        self.validate = validate
        self.log = log

    def after_epoch(self, trainer: Trainer) -> None:
        """Validates and updates the best."""
        state = trainer.state
        if not _evaluates_now(self.config, trainer):
            return
        started = time.perf_counter()
        with trainer.evaluating():
            values = self.validate()
        value = values[self.config.monitor]
        if value > state.best_value:
            state.best_value, state.best_step, state.best_epoch = value, state.step, state.epoch
            state.validations_since_best = 0
        else:
            state.validations_since_best += 1
        patience = self.config.patience
        state.stopped_early = patience is not None and state.validations_since_best >= patience
        if self.log is not None:
            seconds = time.perf_counter() - started
            logged = {f"validation/{name}": v for name, v in values.items()} | {"validation/seconds": seconds}
            self.log.write(state.step, logged)
        if trainer.world.is_main:
            with tqdm.external_write_mode():
                logger.info(
                    "epoch %d: validation %s %.4f (best %.4f at epoch %d)",
                    state.epoch,
                    self.config.monitor,
                    value,
                    state.best_value,
                    state.best_epoch,
                )


class TrackTestHook(Hook):
    """Ranks the test split as often as the validation split; writes down the best epoch and chooses nothing by it."""

    def __init__(self, config: EvaluationConfig, test: Callable[[], dict[str, float]], log: MetricsLog | None) -> None:
        self.config = config
        self.test = test
        self.log = log

    def after_epoch(self, trainer: Trainer) -> None:
        """Ranks and updates the best test epoch."""
        if not _evaluates_now(self.config, trainer):
            return
        state = trainer.state
        started = time.perf_counter()
        with trainer.evaluating():
            values = self.test()
        monitor = self.config.monitor
        if values[monitor] > state.best_test.get(monitor, float("-inf")):
            state.best_test, state.best_test_epoch = values, state.epoch
        if self.log is not None:
            logged = {f"reference_protocol/test/{name}": value for name, value in values.items()}
            logged["reference_protocol/seconds"] = time.perf_counter() - started
            self.log.write(state.step, logged)


def _evaluates_now(config: EvaluationConfig, trainer: Trainer) -> bool:
    """Every few epochs, and at the end."""
    return trainer.state.epoch % config.every_epochs == 0 or trainer.state.epoch >= trainer.last_epoch


class CheckpointHook(Hook):
    """Saves at the end of each epoch, every few steps if configured, and when asked to stop."""

    def __init__(self, config: CheckpointConfig, manager: CheckpointManager, tensors: Callable[[], dict[str, Any]]):
        self.config = config
        self.manager = manager
        self.tensors = tensors
        self._restored_step = -1

    def on_start(self, trainer: Trainer) -> None:
        """A restored run need not save where it already is."""
        self._restored_step = trainer.state.step

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Saves every few steps; the end of an epoch saves after its validation."""
        every = self.config.every_steps
        if every is not None and trainer.state.step % every == 0 and trainer.state.batch < len(trainer.loader):
            self._save(trainer)

    def after_epoch(self, trainer: Trainer) -> None:
        """Saves; must come after the evaluation in the list of hooks."""
        self._save(trainer)

    def on_stop(self, trainer: Trainer) -> None:
        """Saves what the run has done since its last checkpoint that was written, and waits for it."""
        self.manager.finish()
        if trainer.state.step not in (self._restored_step, self.manager.saved_step):
            self._save(trainer)
            self.manager.finish()

    def _save(self, trainer: Trainer) -> None:
        self.manager.save(self.tensors(), trainer.state.state_dict(), trainer.state.best_step)
