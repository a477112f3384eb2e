"""Where a preparation keeps what it has finished, so that after a kill the next call goes on from there."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hstu_dist.data.schema import MANIFEST_FILE
from hstu_dist.errors import UserError
from hstu_dist.files import sync, write_atomically

_RESULT = "result.json"

_log = logging.getLogger(__name__)


class Workspace:
    """A folder of finished steps, each a folder of its own that appears whole or not at all."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def step(self, name: str, make: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
        """The folder and the result of a step, made unless an earlier call finished it.

        Args:
            name: of the step.
            make: fills an empty folder and returns what can be written as JSON.
        """
        folder = self.root / name
        if folder.exists():
            _log.info("%s: finished before", folder)
            return folder, json.loads((folder / _RESULT).read_text())
        with self.scratch(name) as building:
            result = make(building)
            (building / _RESULT).write_text(json.dumps(result))
            for file in building.iterdir():
                sync(file)
            building.rename(folder)
        return folder, result

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """An empty folder that is gone afterwards."""
        folder = self.root / f"{name}.building"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def workspace(root: Path, made_from: dict[str, Any]) -> Iterator[Workspace]:
    """The workspace of a data set; gone afterwards, unless the process is killed or interrupted.

    Args:
        root: the folder; what another recipe or other input left there is removed.
        made_from: what determines the result.
    """
    recipe = root / MANIFEST_FILE
    # as they were given: the order of several actions is how they are packed
    content = json.dumps(made_from).encode()
    if root.exists() and not (recipe.exists() and recipe.read_bytes() == content):
        shutil.rmtree(root)
    if root.exists():
        _log.info("%s: going on where an interrupted run stopped", root)
    else:
        root.mkdir()
        write_atomically(recipe, content)
    try:
        yield Workspace(root)
    except (UserError, OSError):
        # another try would meet the same input or the same full disk
        shutil.rmtree(root, ignore_errors=True)
        raise
    shutil.rmtree(root)
