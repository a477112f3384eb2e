"""The documents of the checkout as a reader uses them: commands to copy, links to follow, files and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *sorted(DOCS.glob("*.md"))]

_BASES = (ROOT, ROOT / "hstu_dist", DOCS)
"""Folders that paths in running text start from."""

_ELSEWHERE = ("runs/", "data/", "RUN/", "OUTPUT/", "package/", "/", "registry/", "checkpoints/", "logs/")
"""Beginnings of paths that are not in the checkout."""

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_HEREDOC = re.compile(r"<<'?(\w+)'?.*?^\1$", re.DOTALL | re.MULTILINE)
_SEPARATORS = frozenset({"|", "||", "&", "&&", ";", "(", ")", ">", ">>", "<", "<<"})
_SHELL_WORDS = frozenset({"until", "while", "if", "then", "else", "do", "for", "!", "done", "fi"})


def shell_blocks(text: str) -> list[str]:
    """What stands between ```bash and ```."""
    return [body for language, body in _FENCED.findall(text) if language == "bash"]


def commands(text: str) -> Iterator[list[str]]:
    """Words of every command of a page: of its bash blocks, and of indented lines that begin with one of ours."""
    indented = re.findall(r"^    ((?:python -m|make|torchrun) .*)$", _FENCED.sub("", text), re.MULTILINE)
    for block in [*shell_blocks(text), *indented]:
        plain = _HEREDOC.sub("", block).replace("\\\n", " ")
        for line in _lines(plain):
            yield from _split(line)


def _lines(block: str) -> Iterator[str]:
    """Lines, joined while a quote is open."""
    open_line = ""
    for line in block.splitlines():
        open_line += line
        try:
            shlex.split(open_line, comments=True)
        except ValueError:
            open_line += "\n"
            continue
        yield open_line
        open_line = ""


def _split(line: str) -> Iterator[list[str]]:
    words: list[str] = []
    for word in shlex.split(line, comments=True):
        if word in _SEPARATORS:
            if words:
                yield words
            words = []
        elif words or word not in _SHELL_WORDS:
            words.append(word)
    if words:
        yield words


def anchor(heading: str) -> str:
    """The fragment by which code hosts link to a heading."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """Fragments of all headings of a page."""
    found: dict[str, int] = {}
    fragments = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", _FENCED.sub("", page.read_text()), re.MULTILINE):
        name = anchor(heading)
        # a repeated heading gets a number
        fragments.add(f"{name}-{found[name]}" if name in found else name)
        found[name] = found.get(name, 0) + 1
    return fragments


def links(page: Path) -> list[str]:
    """Targets of all links and pictures of a page that stay in the checkout."""
    return re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", _FENCED.sub("", page.read_text()))


def broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere: no such file, or no such heading in it."""
    wrong = []
    for link in links(page):
        path, _, fragment = link.partition("#")
        target = page if not path else page.parent / path
        if not target.exists() or (fragment and target.suffix == ".md" and fragment not in anchors(target)):
            wrong.append(link)
    return wrong


def code_words(text: str) -> list[str]:
    """What stands between backticks in running text."""
    return re.findall(r"`([^`\n]+)`", _FENCED.sub("", text))


def missing_files(page: Path) -> list[str]:
    """Files of the checkout that a page names in running text, and that are not there."""
    named = [word for word in code_words(page.read_text()) if re.fullmatch(r"[\w./-]+/[\w.-]+\.\w+", word)]
    ours = [word for word in named if word.endswith(".py") or not word.startswith(_ELSEWHERE)]
    return [word for word in ours if not any((base / word).exists() for base in _BASES)]
