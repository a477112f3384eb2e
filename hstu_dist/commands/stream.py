"""`train` on a stream: every window is evaluated on, then trained on, until the stream ends or somebody stops it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.checkpoint.manifest import read_manifest
from hstu_dist.commands.embedding_table import embedding_table
from hstu_dist.commands.fitting import Run
from hstu_dist.commands.result_table import result_table
from hstu_dist.commands.session import ModelSession, build_model, sequence_cost
from hstu_dist.config import RunConfig
from hstu_dist.data.config import LoaderConfig
from hstu_dist.data.split import Split
from hstu_dist.data.stream.archive import Archive
from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.data.stream.follower import Follower
from hstu_dist.data.stream.loader import WindowLoader
from hstu_dist.data.stream.pipeline import Pipeline, moment
from hstu_dist.data.stream.quarantine import Quarantine
from hstu_dist.data.stream.source import Source
from hstu_dist.distributed.process_group import World
from hstu_dist.distributed.table_plan import PLAN_FILE
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.run_folder import RunFolder
from hstu_dist.train.metrics_file import read_metrics
from hstu_dist.train.metrics_log import MetricsLog
from hstu_dist.train.prequential import Feed, PrequentialHook, RetentionHook
from hstu_dist.train.state import TrainState
from hstu_dist.train.throughput import training_averages

logger = logging.getLogger(__name__)

_PREFIX = "prequential/"


def train_stream(config: RunConfig, world: World, folder: RunFolder, say: Callable[[str], None]) -> ExitCode:
    """Trains or continues a run on a stream; every rank calls it.

    Raises:
        UserError: the stream cannot be followed, or a step failed.
    """
    data = config.data
    assert isinstance(data, StreamConfig)
    session = build_model(config, world, data.num_items)
    run = Run.restored(session, folder)
    archive = Archive(folder.path / "stream")
    if world.is_main:
        _announce(session, run.state, say)
        folder.describe(config)
        session.recommender.tables.plan.save(folder.path / PLAN_FILE)
    with contextlib.ExitStack() as stack:
        follower = stack.enter_context(_follower(data, archive, folder)) if world.is_main else None
        feed = Feed(_loader(session, archive), follower)

        def evaluation(log: MetricsLog | None) -> list[PrequentialHook]:
            return [PrequentialHook(feed, session.retriever, session.averaged, config.trainer.evaluation, log)]

        retention = RetentionHook(archive, world, lambda: oldest_epoch(run.checkpoints))
        trainer = run.fit(feed.loader, evaluation, [retention])
    for path in draw(folder, config) if world.is_main else ():
        say(str(path))
    if trainer.interrupted:
        return run.stopped(say)
    if world.is_main:
        result = _result(session, run.state, folder, ended=trainer.exhausted)
        if result is None:
            say(f"{data.path}: the stream ended without an event to predict")
        else:
            folder.finish(result)
            say(result_table(config, result))
    return ExitCode.FINISHED


def _follower(data: StreamConfig, archive: Archive, folder: RunFolder) -> Follower:
    pipeline = Pipeline(data, archive, Quarantine(folder.path / "quarantine.jsonl"))
    return Follower(Source(data.path), pipeline)


def _loader(session: ModelSession, archive: Archive) -> WindowLoader:
    config = session.config
    settings = LoaderConfig(
        split=Split.TRAIN,
        global_batch_size=config.trainer.global_batch_size,
        max_length=config.data.max_length,
        seed=config.seed,
        batching=config.trainer.batching,
        cost=sequence_cost(lambda n: session.training_flops(session.workload([n])), config.data.max_length),
        emission=config.trainer.emission,
    )
    return WindowLoader(archive, settings, session.shard)


def _announce(session: ModelSession, state: TrainState, say: Callable[[str], None]) -> None:
    config, data = session.config, session.config.data
    assert isinstance(data, StreamConfig)
    say(
        f"run {config.run_dir}: stream {data.path}, windows of a {data.window_length}, {data.num_items} item rows, "
        f"{session.world.size} ranks"
    )
    tables = session.recommender.tables
    say(embedding_table(tables.specs, tables.plan))
    if state.step:
        say(f"continuing at window {state.epoch}, step {state.step}")


def oldest_epoch(checkpoints: CheckpointManager) -> int:
    """Windows finished in the oldest checkpoint that can be read; 0 without one."""
    epochs = []
    for step in checkpoints.steps():
        with contextlib.suppress(UserError):
            epochs.append(int(read_manifest(checkpoints.path(step)).state["epoch"]))
    return min(epochs, default=0)


def windows_of(folder: RunFolder) -> list[dict[str, Any]]:
    """What the log says of each evaluated window, in order, without the common prefix.

    A run that was interrupted may have evaluated a window twice, with the same figures.
    """
    found: dict[float, dict[str, Any]] = {}
    for line in read_metrics(folder.path):
        values = {key.removeprefix(_PREFIX): value for key, value in line.items() if key.startswith(_PREFIX)}
        if values:
            found[values["window"]] = values
    return [found[number] for number in sorted(found)]


def draw(folder: RunFolder, config: RunConfig) -> tuple[Any, ...]:
    """`prequential.png` and `.svg`: the monitored metric over time, and events a window; none without a prediction."""
    # matplotlib takes half a second to import
    from hstu_dist.report.plots import save_prequential

    monitor = config.trainer.evaluation.monitor
    windows = [window for window in windows_of(folder) if f"model/{monitor}" in window]
    if not windows:
        return ()
    lines = {
        label: [window[f"{contender}/{monitor}"] for window in windows]
        for label, contender in ((config.model.kind, "model"), ("popularity so far", "popularity"))
    }
    times = [moment(int(window["start"])) for window in windows]
    title = f"{config.name}: every window predicted before it is trained on"
    return save_prequential(
        times, {monitor: lines}, [window["events"] for window in windows], title, folder.path / "prequential"
    )


def _result(session: ModelSession, state: TrainState, folder: RunFolder, ended: bool) -> dict[str, Any] | None:
    """Means over all events of all windows, each predicted before it was trained on; None if there was none."""
    windows = [window for window in windows_of(folder) if "model/targets" in window]
    if not windows:
        return None
    means = {contender: mean_over(windows, contender) for contender in ("model", "popularity")}
    return {
        "protocol": "prequential",
        "epochs": state.epoch,
        "steps": state.step,
        "refused_steps": state.refused_steps,
        "stopped_early": ended,
        "test": means["model"],
        "popularity": means["popularity"],
        "world_size": session.world.size,
        "dense_parameters": session.dense_parameters,
        "speed": training_averages(state, session.training_flops),
    }


def mean_over(windows: list[dict[str, Any]], contender: str) -> dict[str, float]:
    """Metrics over several windows, each weighted by its targets."""
    total = sum(window[f"{contender}/targets"] for window in windows)
    names = [key.partition("/")[2] for key in windows[0] if key.startswith(f"{contender}/")]
    return {
        name: sum(window[f"{contender}/{name}"] * window[f"{contender}/targets"] for window in windows) / total
        for name in names
        if name != "targets"
    }
