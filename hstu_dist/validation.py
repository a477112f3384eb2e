"""How configuration dataclasses are checked, and how a failed check becomes one readable line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ConfigDict, ValidationError

from hstu_dist.errors import UserError

STRICT = ConfigDict(extra="forbid", validate_default=True, use_enum_values=False)
"""pydantic settings of every configuration dataclass: an unknown key is an error, defaults are checked too."""


def as_user_error(error: ValidationError, source: str, values: Mapping[str, Any]) -> UserError:
    """The first failed check of a configuration as `field: got ..., expected ...`.

    Args:
        error: what pydantic raised.
        source: what was being read, for example `configuration`.
        values: what was checked.
    """
    first = error.errors(include_url=False)[0]
    field = ".".join(_path(first["loc"], values))
    expected = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "missing" or "got" in expected else f" (got {first['input']!r})"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return UserError(
        f"{source}: {field + ': ' if field else ''}{expected}{got}{more}", "correct it in YAML or as key=value"
    )


def _path(location: tuple[int | str, ...], values: Any) -> Iterator[str]:
    """Keys as the user wrote them: pydantic adds the variant (`kind`) of a group to the path."""
    for part in location:
        if isinstance(values, Mapping) and part not in values and part == values.get("kind"):
            continue
        values = values.get(part) if isinstance(values, Mapping) else None
        yield str(part)
