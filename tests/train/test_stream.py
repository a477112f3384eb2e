"""Training on a stream: killed anywhere it goes on as if it had not been, and each event is trained on once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu_dist.__main__ import main
from hstu_dist.checkpoint.manifest import Manifest, read_manifest
from hstu_dist.commands.stream import oldest_epoch, windows_of
from hstu_dist.commands.train import train
from hstu_dist.config import compose
from hstu_dist.data.stream import archive as archive_module
from hstu_dist.errors import UserError
from hstu_dist.run_folder import RunFolder
from hstu_dist.train.state import TrainState
from hstu_dist.train.trainer import Trainer
from tests.data.stream.cases import NUM_ITEMS, config_of, drain, events_of, pipeline_of, write_stream
from tests.distributed.ranks import RanksFailedError, run_ranks

HOURS = 5
MAX_LENGTH = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stream(tmp_path_factory.mktemp("stream") / "files", events_of(HOURS, users=30, a_user=4))


def overrides(files: Path, output: Path, *more: str) -> list[str]:
    return [
        "name=stream",
        "data=stream",
        "trainer.epochs=null",
        f"data.path={files}",
        f"data.num_items={NUM_ITEMS}",
        "data.item_ids=dense",
        "data.action_column=action",
        f"data.max_length={MAX_LENGTH}",
        "data.settle_seconds=0",
        "data.poll_seconds=0.05",
        f"output={output}",
        "model.width=8",
        "loss.num_negatives=8",
        "trainer.global_batch_size=4",
        "trainer.device=cpu",
        "trainer.timeout_seconds=30",
        "trainer.checkpoint.every_steps=4",
        "trainer.evaluation={cutoffs: [1, 10], monitor: hr@10}",
        "trainer.logging={progress: false, tensorboard: false, every_steps: 3}",
        *more,
    ]


def run_stream(files: Path, output: Path, fate: Callable[[], None] | None = None, *more: str) -> list[str]:
    """Runs to the end; `fate` is called on the way in."""
    said: list[str] = []
    if fate is not None:
        fate()
    train(compose(overrides(files, output, *more)), said.append)
    return said


def dies_in_step(step: int) -> Callable[[], None]:
    return _Dies("step", step)


def dies_in_commit(number: int) -> Callable[[], None]:
    return _Dies("commit", number)


class _Dies:
    """A real SIGKILL of the process itself: in the middle of a step, or of writing a window."""

    def __init__(self, where: str, number: int) -> None:
        self.where, self.number = where, number

    def __call__(self) -> None:
        rank = int(os.environ["RANK"])
        if self.where == "step" and rank == 1:
            counted = Trainer._count

            def count(trainer: Trainer, *arguments: Any) -> None:
                counted(trainer, *arguments)
                if trainer.state.step == self.number:
                    os.kill(os.getpid(), signal.SIGKILL)

            Trainer._count = count  # type: ignore[method-assign]
        elif self.where == "commit" and rank == 0:
            calls = iter(range(10**6))
            sync = archive_module.sync

            def kill(path: Path) -> None:
                sync(path)
                if next(calls) == self.number:
                    os.kill(os.getpid(), signal.SIGKILL)

            archive_module.sync = kill  # type: ignore[attr-defined]


def outcome(output: Path) -> tuple[dict[str, Any], Manifest]:
    """The result without timings, and the last checkpoint."""
    folder = output / "stream"
    result = json.loads((folder / "result.json").read_text())
    del result["speed"]
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda f: f.name)
    return result, read_manifest(newest)


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    run_ranks(2, run_stream, files, output)
    return output


@pytest.mark.distributed
def test_every_event_is_evaluated_and_trained_on_once(whole: Path) -> None:
    result, manifest = outcome(whole)
    parts = events_of(HOURS, users=30, a_user=4)
    users = np.concatenate([part.users for part in parts])
    # a user's first event has nothing before it to be predicted from
    targets = len(users) - len(np.unique(users))
    state = TrainState()
    state.load_state_dict(manifest.state)
    assert state.tokens - state.context == targets and state.epoch == HOURS == result["epochs"]
    windows = windows_of(RunFolder(whole / "stream"))
    assert sum(window["model/targets"] for window in windows if "model/targets" in window) == targets
    assert [window["window"] for window in windows] == list(range(HOURS))
    assert result["dense_parameters"] > 0 and result["refused_steps"] == 0
    assert result["stopped_early"] and set(result["test"]) == {"hr@1", "ndcg@1", "hr@10", "ndcg@10", "mrr"}
    assert (whole / "stream" / "prequential.png").stat().st_size > 5000
    # what no checkpoint can come back to is gone
    assert 1 <= len(list((whole / "stream" / "stream").glob("window-*"))) <= 3


@pytest.mark.distributed
def test_items_of_a_dense_stream_are_scored_by_their_numbers(whole: Path, tmp_path: Path) -> None:
    asked = {"item_ids": [[0, 3], [NUM_ITEMS - 1]], "timestamps": [[10, 20], [5]], "candidates": [[1, 2], [4]]}
    pq.write_table(pa.table(asked), tmp_path / "asked.parquet")
    words = [
        "score",
        str(whole / "stream"),
        f"input={tmp_path / 'asked.parquet'}",
        f"output={tmp_path / 'out.parquet'}",
    ]
    assert main([*words, "device=cpu", "threads=1"]) == 0
    assert [len(row) for row in pq.read_table(tmp_path / "out.parquet")["scores"].to_pylist()] == [2, 1]
    pq.write_table(pa.table({**asked, "candidates": [[NUM_ITEMS], [4]]}), tmp_path / "asked.parquet")
    assert main([*words, "device=cpu", "threads=1"]) == 2


@pytest.mark.distributed
def test_a_finished_stream_says_so(whole: Path, files: Path) -> None:
    said = "\n".join(run_ranks(1, run_stream, files, whole)[0])
    assert "already finished at epoch 5" in said and "each predicted before it was trained on" in said


@pytest.mark.distributed
@pytest.mark.parametrize(
    "fates", [[dies_in_step(3), dies_in_step(9), dies_in_commit(5), dies_in_step(25)], [dies_in_commit(25)]]
)
def test_killed_anywhere_it_ends_as_if_nothing_had_happened(
    fates: list[Callable[[], None]], whole: Path, files: Path, tmp_path: Path
) -> None:
    for fate in fates:
        with pytest.raises(RanksFailedError):
            run_ranks(2, run_stream, files, tmp_path, fate)
    run_ranks(2, run_stream, files, tmp_path)
    found, expected = outcome(tmp_path), outcome(whole)
    assert found[0] == expected[0]
    states = []
    for _, manifest in (found, expected):
        states.append(TrainState())
        states[-1].load_state_dict(manifest.state)
    # compared without timings
    assert states[0] == states[1]
    # checksums of all tensors
    assert found[1].files == expected[1].files


def asked_to_stop(files: Path, output: Path) -> list[str]:
    """Stops after the third window: the stream has more, but nobody declares its end."""
    said: list[str] = []
    counted = Trainer._count

    def count(trainer: Trainer, *arguments: Any) -> None:
        counted(trainer, *arguments)
        if trainer.state.epoch == 2 and os.environ["RANK"] == "0":
            (output / "stream" / "stop").touch()

    Trainer._count = count  # type: ignore[method-assign]
    train(compose(overrides(files, output)), said.append)
    return said


@pytest.mark.distributed
def test_a_stop_file_ends_an_endless_stream_and_it_goes_on_later(whole: Path, files: Path, tmp_path: Path) -> None:
    endless = write_stream(tmp_path / "files", events_of(HOURS, users=30, a_user=4), end=False)
    said = run_ranks(2, asked_to_stop, endless, tmp_path)
    assert any("stopped at step" in line for line in said[0]) and said[1] == []
    assert not (tmp_path / "stream" / "result.json").exists()
    (tmp_path / "stream" / "stop").unlink()
    (endless / "_SUCCESS").touch()
    # at another number of ranks
    run_ranks(1, run_stream, endless, tmp_path)
    found, expected = outcome(tmp_path)[0], outcome(whole)[0]
    assert found.pop("world_size") == 1 and expected.pop("world_size") == 2
    assert found["steps"] == expected["steps"]
    assert found["test"]["mrr"] == pytest.approx(expected["test"]["mrr"], rel=0.02)


def gives_up(files: Path, output: Path) -> str:
    try:
        train(compose(overrides(files, output, "data.give_up_seconds=0.5")), lambda line: None)
    except UserError as error:
        return error.problem
    return "finished"


def vanishes(files: Path, output: Path) -> str:
    if os.environ["RANK"] == "0":
        counted = Trainer._count

        def count(trainer: Trainer, *arguments: Any) -> None:
            counted(trainer, *arguments)
            if trainer.state.step == 2:
                files.rename(files.with_name("gone"))

        Trainer._count = count  # type: ignore[method-assign]
    return gives_up(files, output)


@pytest.mark.distributed
def test_every_rank_hears_that_the_source_is_gone(tmp_path: Path) -> None:
    files = write_stream(tmp_path / "files", events_of(3), end=False)
    problems = run_ranks(2, vanishes, files, tmp_path)
    assert problems[0] == problems[1] and "cannot be listed" in problems[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["trainer.epochs=3"], "trainer.epochs: got 3, expected null on a stream"),
        (["optimizer.schedule.kind=cosine"], "optimizer.schedule.kind: got cosine, expected constant on a stream"),
        (["trainer.evaluation.patience=3"], "trainer.evaluation.patience: got 3, expected null"),
        (["trainer.evaluation.track_test=true"], "trainer.evaluation.track_test"),
        (["trainer.train_on=train_validation"], "trainer.train_on"),
        (["data.end=never"], "expected an ISO date"),
    ],
)
def test_what_a_stream_cannot_have_is_refused_at_composition(more: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        compose(overrides(tmp_path, tmp_path, *more))


def test_prepared_data_needs_a_number_of_epochs() -> None:
    with pytest.raises(UserError, match=r"trainer.epochs: got null"):
        compose(["name=x", "trainer.epochs=null"])


def test_oldest_epoch_without_checkpoints(tmp_path: Path) -> None:
    from hstu_dist.checkpoint.manager import CheckpointManager

    assert oldest_epoch(CheckpointManager(tmp_path / "none", 2)) == 0


@pytest.mark.distributed
def test_a_window_of_new_users_only_is_passed_without_a_step(tmp_path: Path) -> None:
    parts = events_of(3)
    first = parts[0].at(np.unique(parts[0].users, return_index=True)[1])
    files = write_stream(tmp_path / "files", [first, *parts[1:]])
    assert len(drain(pipeline_of(config_of(files), tmp_path / "alone"))) == 3
    run_ranks(1, run_stream, files, tmp_path)
    result, _ = outcome(tmp_path)
    windows = windows_of(RunFolder(tmp_path / "stream"))
    assert result["epochs"] == 3 and "model/targets" not in windows[0] and "model/targets" in windows[1]
