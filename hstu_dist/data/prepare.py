"""Make the data set that a configuration names; do nothing if it is already there."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hstu_dist.data.amazon import Amazon
from hstu_dist.data.appendix_c import AppendixC
from hstu_dist.data.config import (
    AmazonConfig,
    AppendixCConfig,
    DataSetConfig,
    Duplicates,
    EventsConfig,
    MovieLensConfig,
    PluginDataConfig,
    PreparationConfig,
    SyntheticZipfConfig,
    recipe_of,
)
from hstu_dist.data.engine import Engine
from hstu_dist.data.events import EventLog, Origin
from hstu_dist.data.flat_columns import write_index
from hstu_dist.data.plugin_source import PluginSource
from hstu_dist.data.schema import (
    CONTEXT_FILE,
    ITEMS_FILE,
    MANIFEST_FILE,
    USERS_FILE,
    Manifest,
    file_hash,
    load_manifest,
)
from hstu_dist.data.sequences import Cleaning, Log, build_sequences
from hstu_dist.data.sources import MovieLens
from hstu_dist.data.staging import Staged, engine_memory, stage
from hstu_dist.data.statistics import describe
from hstu_dist.data.synthetic import SyntheticZipf
from hstu_dist.data.user_features import UserFeatures, features_fingerprint
from hstu_dist.data.workspace import Workspace, workspace
from hstu_dist.data.writer import exclusive, link, os_errors_of, replacing
from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically
from hstu_dist.machine import memory_per_rank

_log = logging.getLogger(__name__)


EventSource = MovieLens | Amazon | EventLog | PluginSource
_Synthetic = SyntheticZipf | AppendixC


def prepare(config: DataSetConfig, how: PreparationConfig | None = None) -> Manifest:
    """Bring the data set at `config.path` up to date with the configuration and its source.

    A second call with the same settings and the same input changes nothing. Several processes may call it at
    once: one works, the others wait. A data set at `config.path` is left alone until the new one is complete; a call
    after one that was killed goes on with the steps that were not finished.

    Args:
        config: the data set.
        how: engine and memory; they do not change the result.

    Returns:
        The manifest of the data set.

    Raises:
        UserError: the input cannot be fetched or used, or the data set cannot be written.
    """
    # resolved, so that a linked folder is replaced where it really is
    target = Path(config.path).resolve()
    source = _source(config)
    made_from = _made_from(config, source)
    root = target.parent / f".{target.name}.work"
    # killed at the very end, a run leaves a complete data set and its workspace
    if not root.exists() and (manifest := _up_to_date(target, made_from)):
        _log.info("%s: up to date (%s)", target, _summary(manifest))
        return manifest
    with exclusive(target):
        if manifest := _up_to_date(target, made_from):
            shutil.rmtree(root, ignore_errors=True)
            _log.info("%s: prepared by another process (%s)", target, _summary(manifest))
            return manifest
        if isinstance(source, _Synthetic):
            with replacing(target) as folder:
                source.write(folder)
                manifest = _finish(folder, made_from)
        else:
            with os_errors_of(target), workspace(root, made_from) as work:
                features = _features(config, work)
                results = _events_to_sequences(source, _cleaning(config), how or PreparationConfig(), work)
                with replacing(target) as folder:
                    for result in results:
                        link(result, folder / result.name)
                    if features is not None:
                        features.write(folder)
                    manifest = _finish(folder, made_from)
    _log.info("%s: prepared (%s)", target, _summary(manifest))
    return manifest


def _made_from(config: DataSetConfig, source: EventSource | _Synthetic) -> dict[str, Any]:
    """What of the manifest is known before anything is read."""
    made_from: dict[str, Any] = {"name": config.kind, "recipe": recipe_of(config), "sources": source.fingerprint()}
    if isinstance(config, EventsConfig):
        made_from["sources"] = made_from["sources"] | features_fingerprint(config)
        made_from |= {"action_fields": dict(config.action_columns), "contextual": tuple(config.contextual_columns)}
    return made_from


def _features(config: DataSetConfig, work: Workspace) -> UserFeatures | None:
    if not isinstance(config, EventsConfig):
        return None
    with work.scratch("features") as scratch:
        return UserFeatures.read(config, scratch)


def _events_to_sequences(
    source: EventSource, cleaning: Cleaning, how: PreparationConfig, work: Workspace
) -> list[Path]:
    """The files and the folder of columns that are the data set."""
    memory = how.memory_bytes(memory_per_rank(1))
    folder, staged = work.step("events", lambda folder: _stage(source, folder, work, memory))
    log = Log(folder=folder, staged=Staged(**staged["staged"]), origin=Origin(**staged["origin"]))
    with work.scratch("engine") as scratch, _engine(how, memory, scratch) as engine:
        return build_sequences(log, cleaning, engine, work)


def _stage(source: EventSource, folder: Path, work: Workspace, memory: int) -> dict[str, Any]:
    with work.scratch("text") as scratch:
        events = source.open(scratch) if isinstance(source, EventLog | PluginSource) else source.read()
        staged = stage(events, folder, memory)
        return {"staged": asdict(staged), "origin": asdict(events.origin)}


@contextmanager
def _engine(how: PreparationConfig, memory: int, scratch: Path) -> Iterator[Engine]:
    # imported here: each is a large library, and a cluster's is an extra
    if how.engine == "spark":
        from hstu_dist.data.spark_engine import SparkEngine

        with SparkEngine() as spark:
            yield spark
    else:
        from hstu_dist.data.duckdb_engine import DuckDBEngine

        with DuckDBEngine(engine_memory(memory), scratch) as duckdb:
            yield duckdb


def _source(config: DataSetConfig) -> EventSource | _Synthetic:
    match config:
        case MovieLensConfig():
            return MovieLens(config)
        case AmazonConfig():
            return Amazon(config)
        case EventsConfig():
            return EventLog(config)
        case SyntheticZipfConfig():
            return SyntheticZipf(config)
        case AppendixCConfig():
            return AppendixC(config)
        case PluginDataConfig():
            return PluginSource(config)


def _cleaning(config: DataSetConfig) -> Cleaning:
    match config:
        case MovieLensConfig() | SyntheticZipfConfig() | AppendixCConfig() | PluginDataConfig():
            return Cleaning()
        case AmazonConfig():
            return Cleaning(duplicates=Duplicates.DROP, min_user_events=5, min_item_events=5)
        case EventsConfig():
            return Cleaning(
                duplicates=config.duplicates,
                min_user_events=config.min_user_events,
                min_item_events=config.min_item_events,
            )


def _up_to_date(target: Path, made_from: dict[str, Any]) -> Manifest | None:
    """The manifest at `target`, if it was made the same way and its files are whole."""
    try:
        manifest = load_manifest(target)
        same = all(getattr(manifest, name) == value for name, value in made_from.items())
        same &= list(manifest.action_fields) == list(made_from.get("action_fields", {}))
        return manifest if same and manifest.files == _hashes(target, manifest.files) else None
    except (UserError, OSError):
        return None


def _finish(folder: Path, made_from: dict[str, Any]) -> Manifest:
    """Describe a data set whose files are there."""
    context = [CONTEXT_FILE] if (folder / CONTEXT_FILE).exists() else []
    names = [USERS_FILE, ITEMS_FILE, *context, *sorted(file.name for file in folder.glob("sequences*.parquet"))]
    manifest = describe(folder, _hashes(folder, names), made_from)
    write_index(folder, manifest.sequence_files)
    write_atomically(folder / MANIFEST_FILE, manifest.to_json().encode())
    return manifest


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: file_hash(folder / name) for name in names}


def _summary(manifest: Manifest) -> str:
    return f"{manifest.num_users:,} users, {manifest.num_items:,} items, {manifest.num_events:,} events"
