"""docs/inference.md shows the mask that is computed, and settings that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hstu_dist.commands.use import Words
from hstu_dist.inference.config import ExportConfig, RetrieveConfig, ScoreConfig, ServeConfig
from tests.inference.mask_picture import FIGURES, PICTURES, picture

PAGE = (Path(__file__).parents[2] / "docs" / "inference.md").read_text()
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^python -m hstu_dist .*$", PAGE, re.MULTILINE)]
KINDS = {"score": ScoreConfig, "retrieve": RetrieveConfig, "export": ExportConfig, "serve": ServeConfig}


@pytest.mark.parametrize(("file", "page"), [("mfalcon_masks", "inference"), ("ranking_masks", "ranking")])
def test_the_picture_is_the_mask(file: str, page: str) -> None:
    drawn = (FIGURES / f"{file}.svg").read_text()
    assert drawn == picture(PICTURES[file]), "run python -m tests.inference.mask_picture"
    assert f"figures/{file}.svg" in (FIGURES.parent / f"{page}.md").read_text()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_compose(command: list[str]) -> None:
    words = Words.of(command[3], KINDS[command[3]], command[4:])  # type: ignore[type-var]
    assert words.run is not None or words.overrides


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE)
    assert links and not [link for link in links if not (FIGURES.parent / link).exists()]
