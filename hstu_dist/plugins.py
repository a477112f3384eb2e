"""Parts of a run from modules of the user's own: settings name them, and list the modules they may come from."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from hstu_dist.errors import UserError
from hstu_dist.validation import STRICT

Target = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
"""`package.module:name`, a class or function."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PluginConfig:
    """Something of the user's own.

    Attributes:
        target: `package.module:name`.
        settings: what it is given, keys of its own.
    """

    target: Target
    settings: dict[str, Any] = Field(default_factory=dict)


def find(target: str) -> Any:
    """What a target names; imports its module.

    Only targets of a checked run come here: their modules are listed in its `plugins`.

    Raises:
        UserError: there is no such module or name, or the module fails when it is imported.
    """
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{target}: no module {error.name}", "install it, or run the command in the folder that has it"
        ) from error
    except AttributeError as error:
        raise UserError(f"{target}: module {module} has no {name}", "correct the name after the colon") from error
    except Exception as error:
        raise UserError(
            f"{target}: importing {module} failed with {type(error).__name__}: {error}", "mend the module"
        ) from error


def check_listed(targets: Iterable[str], listed: Collection[str]) -> None:
    """Whether the modules of all targets are listed.

    Raises:
        ValueError: one is not.
    """
    for target in targets:
        module = target.partition(":")[0]
        if module not in listed:
            shown = ", ".join(listed) or "none"
            raise ValueError(
                f"plugins: got {shown}, expected {module} among them, which {target} is to be imported from"
            )
