"""How configuration dataclasses are checked, and how a failed check becomes one readable line."""

from __future__ import annotations

from pydantic import ConfigDict, ValidationError

from hstu_dist.errors import UserError

STRICT = ConfigDict(extra="forbid", validate_default=True, use_enum_values=False)
"""pydantic settings of every configuration dataclass: an unknown key is an error, defaults are checked too."""


def as_user_error(error: ValidationError, source: str) -> UserError:
    """The first failed check of a configuration as `field: got ..., expected ...`.

    Args:
        error: what pydantic raised.
        source: what was being read, for example `configuration`.
    """
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"] if part != "__init__")
    expected = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "missing" or "got" in expected else f" (got {first['input']!r})"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return UserError(f"{source}: {field or 'whole'}: {expected}{got}{more}", f"set {field}=VALUE" if field else "")
