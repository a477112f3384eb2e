"""What a run folder says about its run, finished or not."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_dist.config import RunConfig, load
from hstu_dist.data.schema import Manifest
from hstu_dist.errors import UserError
from hstu_dist.run_folder import RunFolder, manifest_of
from hstu_dist.train.metrics_file import read_metrics

_LOGGED = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ (WARNING|ERROR|CRITICAL) (.*)$")


@dataclass(frozen=True, kw_only=True)
class RunData:
    """One run.

    Attributes:
        folder: of the run.
        config: its settings.
        environment: its environment.json; empty before the first rank was up.
        result: its result.json; empty unless it has finished.
        metrics: lines of its log, oldest first.
        plan: its embedding_plan.json; empty without one.
        manifest: of the data set; None for a stream, and where the data set has gone.
        warnings: what its ranks warned of or failed with, each once, with how often it was said.
    """

    folder: RunFolder
    config: RunConfig
    environment: dict[str, Any]
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    plan: dict[str, Any]
    manifest: Manifest | None
    warnings: dict[str, int]

    @classmethod
    def read(cls, path: Path) -> RunData:
        """From a run folder.

        Raises:
            UserError: no run was started there, or a file is damaged.
        """
        folder = RunFolder(path)
        if not folder.config_file.exists():
            raise UserError(f"{path}: holds no run (no {folder.config_file.name})", "give a folder such as runs/ml1m")
        config = load(folder.config_file)
        try:
            return cls(
                folder=folder,
                config=config,
                environment=folder.environment(),
                result=folder.finished(config.trainer.last_epoch) or {},
                metrics=read_metrics(path),
                plan=_json(path / "embedding_plan.json"),
                manifest=manifest_of(config),
                warnings=_warnings(folder.logs / "ranks"),
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error})", "remove the damaged file") from error

    def line(self, name: str) -> list[tuple[int, float]]:
        """Steps and values of a metric."""
        return [(line["step"], line[name]) for line in self.metrics if name in line]


def _json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return values


def _warnings(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for file in sorted(folder.glob("rank-*.log")):
        for text in file.read_text(errors="replace").splitlines():
            logged = _LOGGED.match(text)
            if logged:
                message = f"{logged[1].lower()}: {logged[2]}"
                found[message] = found.get(message, 0) + 1
    return found
