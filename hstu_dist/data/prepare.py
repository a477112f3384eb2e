"""Make the data set that a configuration names; do nothing if it is already there."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import hstu_dist
from hstu_dist.data.amazon import Amazon
from hstu_dist.data.config import (
    AmazonConfig,
    DataSetConfig,
    Duplicates,
    EventsConfig,
    MovieLensConfig,
    SyntheticZipfConfig,
)
from hstu_dist.data.events import EventLog, EventTable
from hstu_dist.data.schema import DATA_FILES, FORMAT_VERSION, MANIFEST_FILE, Manifest, file_hash, load_manifest
from hstu_dist.data.sequences import Cleaning, Sequences, build_sequences
from hstu_dist.data.sources import MovieLens
from hstu_dist.data.synthetic import SyntheticZipf
from hstu_dist.data.writer import exclusive, replacing, write_sequences, write_text
from hstu_dist.errors import UserError

# settings that say where things are and how they are read, not what is in the data set
_NOT_CONTENT = {"kind", "path", "max_length", "stochastic_length", "input", "archive", "source"}

_log = logging.getLogger(__name__)


class Source(Protocol):
    """Where events come from."""

    def fingerprint(self) -> dict[str, str]:
        """Hash of every input by name; fetches nothing whose hash is known."""

    def read(self) -> EventTable | Sequences:
        """All events, checked, or finished sequences."""


def prepare(config: DataSetConfig) -> Manifest:
    """Bring the data set at `config.path` up to date with the configuration and its source.

    A second call with the same settings and the same input changes nothing. Several processes may call it at
    once: one works, the others wait. A data set at `config.path` is left alone until all events
    are read and checked.

    Returns:
        The manifest of the data set.

    Raises:
        UserError: the input cannot be fetched or used, or the data set cannot be written.
    """
    # resolved, so that a linked folder is replaced where it really is
    target = Path(config.path).resolve()
    source = _source(config)
    recipe = {name: value for name, value in asdict(config).items() if name not in _NOT_CONTENT}
    made_from: dict[str, Any] = {"name": config.kind, "recipe": recipe, "sources": source.fingerprint()}
    if manifest := _up_to_date(target, made_from):
        _log.info("%s: up to date (%s)", target, _summary(manifest))
        return manifest
    with exclusive(target):
        if manifest := _up_to_date(target, made_from):
            _log.info("%s: prepared by another process (%s)", target, _summary(manifest))
            return manifest
        found = source.read()
        sequences = found if isinstance(found, Sequences) else build_sequences(found, _cleaning(config))
        with replacing(target) as folder:
            write_sequences(folder, sequences)
            manifest = _describe(folder, sequences, made_from)
            write_text(folder / MANIFEST_FILE, manifest.to_json())
    _log.info("%s: prepared (%s)", target, _summary(manifest))
    return manifest


def _source(config: DataSetConfig) -> Source:
    match config:
        case MovieLensConfig():
            return MovieLens(config)
        case AmazonConfig():
            return Amazon(config)
        case EventsConfig():
            return EventLog(config)
        case SyntheticZipfConfig():
            return SyntheticZipf(config)


def _cleaning(config: DataSetConfig) -> Cleaning:
    match config:
        case MovieLensConfig() | SyntheticZipfConfig():
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
        return manifest if same and manifest.files == _hashes(target) else None
    except (UserError, OSError):
        return None


def _describe(folder: Path, sequences: Sequences, made_from: dict[str, Any]) -> Manifest:
    lengths = sequences.offsets[1:] - sequences.offsets[:-1]
    return Manifest(
        format_version=FORMAT_VERSION,
        created_by=f"hstu_dist {hstu_dist.__version__}",
        num_users=len(sequences.users),
        num_items=len(sequences.items),
        num_events=len(sequences.item_ids),
        mean_length=round(float(lengths.mean()), 3),
        max_length=int(lengths.max()),
        files=_hashes(folder),
        **made_from,
    )


def _hashes(folder: Path) -> dict[str, str]:
    return {name: file_hash(folder / name) for name in DATA_FILES}


def _summary(manifest: Manifest) -> str:
    return f"{manifest.num_users:,} users, {manifest.num_items:,} items, {manifest.num_events:,} events"
