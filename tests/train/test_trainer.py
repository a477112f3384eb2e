"""The loop: order of its hooks, where it stops, what it counts."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.commands.fitting import stop_requests
from hstu_dist.models.flops import Workload
from hstu_dist.train import trainer as trainer_module
from hstu_dist.train.config import CheckpointConfig, EvaluationConfig, LoggingConfig, ProfileConfig
from hstu_dist.train.hooks import CheckpointHook, EvaluateHook, LogHook, TrackTestHook
from hstu_dist.train.metrics_file import read_metrics
from hstu_dist.train.metrics_log import MetricsLog
from hstu_dist.train.profile import ProfileHook
from hstu_dist.train.state import TrainState
from hstu_dist.train.step import StepResult
from hstu_dist.train.trainer import Hook, Trainer
from tests.train.cases import BATCHES, idle_trainer


def flops_of(work: Workload) -> int:
    return 1000 * work.tokens


@dataclass
class Recorder(Hook):
    """Writes down every call with the state it saw."""

    name: str = ""
    calls: list[Any] = field(default_factory=list)

    def on_start(self, trainer: Trainer) -> None:
        self._note("start", trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self._note("step", trainer)

    def after_epoch(self, trainer: Trainer) -> None:
        self._note("epoch", trainer)

    def on_stop(self, trainer: Trainer) -> None:
        self._note("stop", trainer)

    def _note(self, call: str, trainer: Trainer) -> None:
        state = trainer.state
        self.calls.append((f"{self.name}{call}", state.epoch, state.batch, state.step))


def test_hooks_are_called_in_order_with_a_state_that_counts() -> None:
    calls: list[Any] = []
    hooks = [Recorder("a ", calls), Recorder("b ", calls)]
    trainer = idle_trainer(hooks)
    trainer.fit()
    one = [("start", 0, 0, 0)]
    for epoch in range(2):
        steps = range(1, BATCHES + 1)
        one += [("step", epoch, batch, epoch * BATCHES + batch) for batch in steps]
        one += [("epoch", epoch + 1, 0, (epoch + 1) * BATCHES)]
    one += [("stop", 2, 0, 2 * BATCHES)]
    assert calls == [(f"{name} {call}", *seen) for call, *seen in one for name in ("a", "b")]
    assert not trainer.interrupted and trainer.total_steps == trainer.state.step == 2 * BATCHES


def test_tokens_and_positions_reach_the_step() -> None:
    seen = []

    def step(batch: Any, work: Workload, position: tuple[int, int]) -> StepResult:
        assert work == Workload.causal(batch.lengths.tolist()) and work.tokens == batch.num_tokens
        seen.append(position)
        return StepResult(0.0, work, 0.0)

    trainer = idle_trainer(step=step)
    trainer.fit()
    assert seen == [(i, 2 * BATCHES) for i in range(2 * BATCHES)]
    lengths = [n for batch in trainer.loader.epoch(0) for n in batch.lengths.tolist()]
    counted = Workload(tokens=trainer.state.tokens, attention_pairs=trainer.state.attention_pairs)
    assert counted == Workload.causal(lengths * 2)


def test_a_restored_state_continues_inside_its_epoch() -> None:
    recorder = Recorder()
    idle_trainer([recorder], TrainState(epoch=1, batch=2, step=BATCHES + 2)).fit()
    assert [call for call, *_ in recorder.calls] == ["start", "step", "epoch", "stop"]
    finished = Recorder()
    idle_trainer([finished], TrainState(epoch=2, step=2 * BATCHES)).fit()
    assert [call for call, *_ in finished.calls] == ["start", "stop"]


@pytest.mark.parametrize("stop_at", [0, 2, 3, 5])
def test_a_request_to_stop_ends_before_the_next_step(stop_at: int) -> None:
    trainer = idle_trainer()
    trainer.stop_requested = lambda: trainer.state.step >= stop_at
    trainer.fit()
    assert trainer.interrupted and trainer.state.step == stop_at
    assert (trainer.state.epoch, trainer.state.batch) == divmod(stop_at, BATCHES)


def test_an_error_in_the_step_is_the_caller_s() -> None:
    def step(batch: Any, work: Workload, position: tuple[int, int]) -> StepResult:
        raise RuntimeError("broken step")

    with pytest.raises(RuntimeError, match="broken step"):
        idle_trainer(step=step).fit()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_become_a_question(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests(None) as stop_requested:
        assert not stop_requested()
        os.kill(os.getpid(), number)
        assert stop_requested()
    assert signal.getsignal(number) is before


def evaluation(values: list[float], **settings: Any) -> EvaluateHook:
    left = iter(values)
    return EvaluateHook(EvaluationConfig(**settings), lambda: {"ndcg@10": next(left)}, log=None)


def test_the_best_epoch_is_remembered_and_patience_ends_the_run() -> None:
    trainer = idle_trainer([evaluation([0.2, 0.1, 0.3, 0.3, 0.2, 0.9], patience=2)], epochs=9)
    trainer.fit()
    state = trainer.state
    # an equal value is no better; a better one starts the count anew
    assert (state.best_epoch, state.best_step, state.best_value) == (3, 3 * BATCHES, 0.3)
    assert state.stopped_early and state.epoch == 5 and not trainer.interrupted
    # and the end of it survives a restart
    restored = TrainState()
    restored.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert restored == state
    again = idle_trainer(state=restored, epochs=9)
    again.fit()
    assert again.state.step == 5 * BATCHES


def test_validation_comes_every_few_epochs_and_at_the_end() -> None:
    epochs: list[int] = []
    trainer = idle_trainer(epochs=5)

    def validate() -> dict[str, float]:
        epochs.append(trainer.state.epoch)
        return {"ndcg@10": 0.1 * len(epochs)}

    trainer.hooks = [EvaluateHook(EvaluationConfig(every_epochs=2), validate, log=None)]
    trainer.fit()
    assert epochs == [2, 4, 5] and trainer.state.best_epoch == 5


def test_the_tracked_test_split_chooses_nothing(tmp_path: Path) -> None:
    config = EvaluationConfig(patience=2, track_test=True)
    readings = iter([{"ndcg@10": value, "hr@10": 2 * value} for value in (0.1, 0.2, 0.4, 0.3, 0.9)])
    logging = LoggingConfig(progress=False, tensorboard=False)
    with MetricsLog(tmp_path, logging, {}, resume_step=0) as log:
        hooks = [evaluation([0.2, 0.3, 0.1, 0.1], patience=2), TrackTestHook(config, lambda: next(readings), log)]
        trainer = idle_trainer(hooks, epochs=9)
        trainer.fit()
    state = trainer.state
    # validation alone picked epoch 2 and ended the run before the best test reading came
    assert (state.epoch, state.best_epoch, state.stopped_early) == (4, 2, True)
    assert (state.best_test_epoch, state.best_test) == (3, {"ndcg@10": 0.4, "hr@10": 0.8})
    logged = [line["reference_protocol/test/hr@10"] for line in read_metrics(tmp_path)]
    assert logged == [0.2, 0.4, 0.8, 0.6]
    restored = TrainState()
    restored.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert restored == state


def test_a_run_can_end_inside_its_schedule() -> None:
    positions: list[tuple[int, int]] = []
    epochs: list[int] = []

    def step(batch: Any, work: Workload, position: tuple[int, int]) -> StepResult:
        positions.append(position)
        return StepResult(0.0, work, 0.0)

    def validate() -> dict[str, float]:
        epochs.append(trainer.state.epoch)
        return {"ndcg@10": 0.5}

    trainer = idle_trainer([EvaluateHook(EvaluationConfig(every_epochs=2), validate, log=None)], epochs=9, step=step)
    trainer.stop_epoch = 3
    trainer.fit()
    assert trainer.state.epoch == 3 and not trainer.state.stopped_early
    # the learning rate still sees all nine, and the last epoch is validated
    assert positions == [(i, 9 * BATCHES) for i in range(3 * BATCHES)] and epochs == [2, 3]


def test_a_fresh_state_survives_json() -> None:
    state = TrainState()
    state.load_state_dict(json.loads(json.dumps(TrainState().state_dict(), allow_nan=False)))
    assert state == TrainState()


def test_a_checkpoint_knows_of_the_validation_before_it(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=1)
    tensors = {"w": torch.zeros(2)}
    hooks = [evaluation([0.5, 0.1, 0.2]), CheckpointHook(CheckpointConfig(), manager, lambda: tensors)]
    idle_trainer(hooks, epochs=3).fit()
    # the best one, and the newest
    assert manager.steps() == [BATCHES, 3 * BATCHES]
    assert manager.load(BATCHES, tensors)["best_value"] == 0.5


def test_a_stopped_run_saves_what_it_has_done_once(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=9)
    trainer = idle_trainer([CheckpointHook(CheckpointConfig(every_steps=2), manager, lambda: {"w": torch.zeros(2)})])
    trainer.stop_requested = lambda: trainer.state.step == 2
    trainer.fit()
    assert manager.steps() == [2]
    # stopped again at once: nothing new to save
    inode = manager.path(2).stat().st_ino
    trainer = idle_trainer(
        [CheckpointHook(CheckpointConfig(), manager, lambda: {"w": torch.zeros(2)})], TrainState(batch=2, step=2)
    )
    trainer.stop_requested = lambda: True
    trainer.fit()
    assert manager.steps() == [2] and manager.path(2).stat().st_ino == inode


def test_metrics_are_logged_by_step_number(tmp_path: Path) -> None:
    config = LoggingConfig(every_steps=2, progress=False, tensorboard=False)
    with MetricsLog(tmp_path, config, {}, resume_step=0) as log:
        idle_trainer([LogHook(config, log, flops_of)], TrainState(epoch=0, batch=1, step=1)).fit()
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert [line["train/loss"] for line in lines] == [1.0, 1.0, 1.0]
    assert [line["train/epoch"] for line in lines] == pytest.approx([2 / 3, 4 / 3, 2.0])
    for line in lines:
        assert line["train/learning_rate"] == 0.5 and line["memory/peak_gib_per_rank"] > 0.01
        assert line["speed/tokens_per_second"] > 0 and line["speed/seconds_per_step"] > 0
        assert line["speed/flops_per_second"] == pytest.approx(1000 * line["speed/tokens_per_second"])
        assert "speed/mfu" not in line


def test_a_refused_step_has_no_loss_and_is_in_no_mean(tmp_path: Path) -> None:
    config = LoggingConfig(every_steps=2, progress=False, tensorboard=False)

    def step(batch: Any, work: Workload, position: tuple[int, int]) -> StepResult:
        refused = position[0] in (1, 2, 3)
        return StepResult(0.0, Workload(), 0.0) if refused else StepResult(3.0 * work.targets, work, 0.0)

    with MetricsLog(tmp_path, config, {}, resume_step=0) as log:
        idle_trainer([LogHook(config, log, flops_of)], step=step).fit()
    assert [line.get("train/loss") for line in read_metrics(tmp_path)] == [3.0, None, 3.0]


def test_speed_is_that_of_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoggingConfig(every_steps=2, progress=False, tensorboard=False)

    clock = [100.0]
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def step(batch: Any, work: Workload, position: tuple[int, int]) -> StepResult:
        clock[0] += 0.01
        return StepResult(0.0, work, 0.0)

    def validate() -> dict[str, float]:
        clock[0] += 0.5
        return {"ndcg@10": 0.5}

    with MetricsLog(tmp_path, config, {}, resume_step=0) as log:
        trainer = idle_trainer([LogHook(config, log, flops_of), EvaluateHook(EvaluationConfig(), validate, None)])
        trainer.step, trainer.peak_flops = step, 1e6
        trainer.fit()
    state = trainer.state
    assert state.evaluation_seconds == pytest.approx(2 * 0.5)
    assert state.train_seconds == pytest.approx(6 * 0.01)
    assert state.available_flops == pytest.approx(1e6 * state.train_seconds)
    # the second line spans a validation
    for line in read_metrics(tmp_path):
        assert line["speed/seconds_per_step"] == pytest.approx(0.01)
        assert line["speed/mfu"] == pytest.approx(line["speed/flops_per_second"] / 1e6)


def test_the_clock_goes_on_where_a_checkpoint_left_it() -> None:
    state = TrainState(epoch=1, step=BATCHES, train_seconds=100.0, evaluation_seconds=7.0, available_flops=3e9)
    restored = TrainState()
    restored.load_state_dict(json.loads(json.dumps(state.state_dict())))
    trainer = idle_trainer(state=restored)
    trainer.peak_flops = 1e6
    trainer.fit()
    assert 100 < restored.train_seconds < 110 and restored.evaluation_seconds == 7
    assert restored.available_flops == pytest.approx(3e9 + 1e6 * (restored.train_seconds - 100))
    # a session on devices that nobody knows leaves the whole unknown
    idle_trainer(state=restored, epochs=3).fit()
    assert restored.available_flops is None
    restored.add_training_time(1.0, 1e6)
    assert restored.available_flops is None


@pytest.mark.parametrize("watched", [True, False])
def test_the_progress_bar_shows_the_run_to_a_terminal(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: watched  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    trainer = idle_trainer([LogHook(LoggingConfig(every_steps=1), None, flops_of)])
    trainer.peak_flops = 1e12
    trainer.fit()
    shown = screen.getvalue()
    assert ("6/6" in shown and "loss=1.0000" in shown and "mfu=0.0%" in shown) if watched else not shown


@pytest.mark.parametrize(("first", "count"), [(0, 1), (2, 2), (4, 99)])
def test_a_trace_of_the_chosen_steps_is_written(first: int, count: int, tmp_path: Path) -> None:
    def step(batch: Any, work: Workload, position: tuple[int, int]) -> StepResult:
        with torch.profiler.record_function(f"step {position[0]}"):
            return StepResult(float(torch.ones(2).sum()), work, 0.0)

    idle_trainer([ProfileHook(ProfileConfig(first_step=first, num_steps=count), tmp_path)], step=step).fit()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    traced = {event["name"] for event in events if str(event.get("name", "")).startswith("step ")}
    assert traced == {f"step {i}" for i in range(first, min(first + count, 2 * BATCHES))}


def test_no_trace_unless_asked(tmp_path: Path) -> None:
    idle_trainer([ProfileHook(ProfileConfig(), tmp_path)]).fit()
    assert not list(tmp_path.iterdir())


def test_memory_is_recorded_beside_the_trace_if_asked(tmp_path: Path) -> None:
    kept: list[torch.Tensor] = []

    def step(batch: Any, work: Workload, position: tuple[int, int]) -> StepResult:
        kept.append(torch.zeros(100_000))
        return StepResult(1.0, work, 0.0)

    config = ProfileConfig(first_step=1, num_steps=2, memory=True)
    idle_trainer([ProfileHook(config, tmp_path)], step=step).fit()
    operators = json.loads((tmp_path / "memory.json").read_text())
    # torch.zeros leaves its memory to aten::empty
    assert sum(operator["bytes"] for operator in operators if operator["bytes"] > 0) >= 2 * 400_000
    assert operators[0]["calls"] >= 2 and operators == sorted(operators, key=lambda o: -o["bytes"])
    with pytest.raises(ValueError, match="memory: got true without first_step"):
        ProfileConfig(memory=True)
