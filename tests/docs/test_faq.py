"""The messages that docs/faq.md explains are those of the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.docs.pages import DOCS, ROOT

MESSAGES = re.findall(r"^```text\n(.*?)\n```$", (DOCS / "faq.md").read_text(), re.DOTALL | re.MULTILINE)
SHORTEST = 4
"""Signs that a text of the source needs to tell messages apart."""
GENERIC = re.compile(r"configuration: |checkpoint |\bgot\b|\bexpected\b|%[\d.]*[sdfg]|[:,]")
"""What many messages have."""
OF_OTHERS = "mismatched input"
"""Hydra's words, which no text of ours has."""


@cache
def texts() -> tuple[re.Pattern[str], ...]:
    """Every string of the package and the launcher; what is filled in may be anything."""
    files = [file for folder in ("hstu_dist", "launch") for file in (ROOT / folder).rglob("*.py")]
    found = {text for file in files for text in patterns(ast.parse(file.read_text()))}
    # a message can be told with its place in front
    return tuple(re.compile(f"(.*: )?{text}") for text in found)


def patterns(source: ast.Module) -> Iterator[str]:
    for node in ast.walk(source):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        literals = [str(part.value) if isinstance(part, ast.Constant) else "" for part in parts]
        if (
            isinstance(parts[0], ast.Constant | ast.FormattedValue)
            and sum(map(str.isprintable, GENERIC.sub("", "".join(literals)).replace(" ", ""))) >= SHORTEST
        ):
            # logging fills in %-formats
            fixed = [".*".join(map(re.escape, re.split(r"%[\d.]*[sdfg]", text))) for text in literals]
            yield "".join(text or ".*" for text in fixed)


def said(message: str) -> bool:
    return any(text.fullmatch(message) for text in texts())


def test_there_are_enough_of_them() -> None:
    assert len(MESSAGES) >= 25


@pytest.mark.slow
@pytest.mark.parametrize("message", MESSAGES)
def test_the_source_says_it(message: str) -> None:
    assert said(message) or OF_OTHERS in message


@pytest.mark.slow
def test_a_message_of_nobody_is_found_out() -> None:
    for place in ("", "configuration: ", "checkpoint runs/x: ", "x: got 1, expected "):
        assert not said(f"{place}nobody says such a thing")
