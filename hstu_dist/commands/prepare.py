"""`prepare`: events of a public data set or of the user's own become sequences; no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hstu_dist.data.config import DataConfig, DataSetConfig, PreparationConfig
from hstu_dist.data.prepare import prepare
from hstu_dist.data.schema import LENGTHS_PLOT, Manifest
from hstu_dist.data.vocabulary import Vocabulary
from hstu_dist.errors import UserError
from hstu_dist.plugins import PluginConfig, check_listed
from hstu_dist.validation import STRICT, as_user_error

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrepareConfig(PreparationConfig):
    """Settings of a preparation.

    Attributes:
        data: the data set.
        plugins: modules of the user's own that data.target may name something in.
    """

    data: DataConfig
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_listed([self.data.target] if isinstance(self.data, PluginConfig) else [], self.plugins)


def prepare_data(values: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Prepares a data set unless it is there already.

    Args:
        values: composed settings.
        say: prints a line for the user.

    Raises:
        UserError: a setting, the source or the target folder cannot be used.
    """
    if isinstance(values.get("data"), Mapping) and values["data"].get("kind") == "stream":
        raise UserError("data=stream: a stream is not prepared", "train on it at once: its files are read as they come")
    try:
        config = TypeAdapter(PrepareConfig).validate_python(values)
    except ValidationError as error:
        raise as_user_error(error, "configuration", values) from error
    manifest = prepare(config.data, config)
    plot = _plot_lengths(config.data, manifest)
    say(
        f"{config.data.path}: {manifest.num_users} users, {manifest.num_items} items, {manifest.num_events} events, "
        f"sequences of {manifest.mean_length:.1f} events on average, {manifest.max_length} at most{plot}"
    )


def _plot_lengths(config: DataSetConfig, manifest: Manifest) -> str:
    """Draws the lengths beside the data; says where, if it could."""
    stem = Path(config.path) / LENGTHS_PLOT
    png = stem.with_name(f"{stem.name}.png")
    try:
        if not png.exists():
            # matplotlib takes half a second to import
            from hstu_dist.report.plots import save_lengths

            title = f"{config.path}: {manifest.num_users:,} sequences, {manifest.num_events:,} events"
            save_lengths(Vocabulary.users(config.path).counts, config.max_length, title, stem)
    except OSError as error:
        _log.info("lengths are not drawn (%s)", error)
        return ""
    return f"; lengths: {png}"
