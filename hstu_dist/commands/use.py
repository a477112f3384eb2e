"""What the commands that use a trained run share: their words, told apart into a run and settings of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from hstu_dist.config import compose_dict
from hstu_dist.errors import UserError
from hstu_dist.inference.config import ExportConfig, RetrieveConfig, ScoreConfig, ServeConfig
from hstu_dist.validation import as_user_error

Settings = TypeVar("Settings", ScoreConfig, RetrieveConfig, ExportConfig, ServeConfig)

USES = {"score": ScoreConfig, "retrieve": RetrieveConfig, "export": ExportConfig, "serve": ServeConfig}
"""Settings of each command, which are also its YAML file."""


@dataclass(frozen=True)
class Words(Generic[Settings]):
    """A command's words, told apart.

    Attributes:
        run: folder of the run, or None where its settings say which.
        overrides: the run's settings, if there is no folder.
        settings: of the command.
    """

    run: Path | None
    overrides: tuple[str, ...]
    settings: Settings

    @classmethod
    def of(cls, command: str, kind: type[Settings], words: Sequence[str]) -> Words[Settings]:
        """Tells `RUN`, `experiment=NAME` and the command's own `key=value` apart.

        Args:
            command: stem of its YAML file.
            kind: class of its settings.
            words: as the user gave them.

        Raises:
            UserError: several runs, an unknown key, or a value that a check refuses.
        """
        own = {field.name for field in fields(kind)}
        runs = [word for word in words if "=" not in word]
        if len(runs) > 1:
            raise UserError(f"{command}: got runs {' and '.join(runs)}, expected one", "give settings as key=value")
        mine = [word for word in words if word.partition("=")[0] in own]
        values = compose_dict(command, mine)
        try:
            settings = TypeAdapter(kind).validate_python(values)
        except ValidationError as error:
            raise as_user_error(error, command, values) from error
        overrides = tuple(word for word in words if "=" in word and word not in mine)
        return cls(Path(runs[0]) if runs else None, overrides, settings)
