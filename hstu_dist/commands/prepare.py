"""`prepare`: events of a public data set or of the user's own become sequences; no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from hstu_dist.data.config import DataConfig, PreparationConfig
from hstu_dist.data.prepare import prepare
from hstu_dist.validation import STRICT, as_user_error


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrepareConfig(PreparationConfig):
    """Settings of a preparation.

    Attributes:
        data: the data set.
    """

    data: DataConfig


def prepare_data(values: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Prepares a data set unless it is there already.

    Args:
        values: composed settings.
        say: prints a line for the user.

    Raises:
        UserError: a setting, the source or the target folder cannot be used.
    """
    try:
        config = TypeAdapter(PrepareConfig).validate_python(values)
    except ValidationError as error:
        raise as_user_error(error, "configuration", values) from error
    manifest = prepare(config.data, config)
    say(
        f"{config.data.path}: {manifest.num_users} users, {manifest.num_items} items, {manifest.num_events} events, "
        f"sequences of {manifest.mean_length:.1f} events on average, {manifest.max_length} at most"
    )
