"""README.md and docs/ say what is true: commands compose, links lead somewhere, tables come from the result files."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hstu_dist.__main__ import _parser, main
from hstu_dist.config import compose, compose_dict
from hstu_dist.errors import ExitCode
from hstu_dist.report.pages import Checkout, embed, everything, summary
from tests.docs import reference
from tests.docs.commands import check
from tests.docs.pages import DOCS, PAGES, ROOT, broken, code_words, commands, links, missing_files
from tests.test_layering import LEVEL

README = (ROOT / "README.md").read_text()
FROM_PAGES = {tuple(words) for page in PAGES for words in commands(page.read_text())}
COMMANDS_OF_THE_PACKAGE = set(_parser()._subparsers._group_actions[0].choices)


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_make_train_runs_the_commands_of_the_main_job(gpus: int, ranks: int, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nfor i in $(seq {gpus}); do echo GPU $i; done\n")
    smi.chmod(0o755)
    # whatever the tests were asked for with make
    kept = {name: value for name, value in os.environ.items() if name not in ("NPROC", "MAKEFLAGS", "MAKELEVEL")}
    environment = {**kept, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["make", "-n", "train"]
    lines = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    modules = [shlex.split(line)[2:] for line in lines.splitlines() if re.search(r"-m (hstu_dist|launch) ", line)]
    assert [m[0] for m in modules] == ["hstu_dist", "launch"]
    assert modules[0][1] == "prepare"
    compose_dict("prepare", modules[0][2:])
    config = compose(modules[1][1:])
    assert (config.nproc, config.data.path, config.model.kind) == (ranks, "data/ml1m", "hstu")


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(FROM_PAGES, key=" ".join), ids=lambda words: " ".join(words)[:100])
def test_every_command_is_accepted(command: tuple[str, ...]) -> None:
    check(command)


@pytest.mark.slow
def test_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    helped = subprocess.run(
        [sys.executable, "-m", "hstu_dist", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for command in ("prepare", "train", "evaluate", "plan"):
        assert re.search(rf"^ +{command} +\w.+$", helped, re.MULTILINE)
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        own = capsys.readouterr().out
        assert "key=value" in own and "data" in own
    assert re.search(r"^ +report +\w.+$", helped, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_commands_named_in_running_text_exist(page: Path) -> None:
    assert not missing_files(page)
    words = code_words(page.read_text())
    ours = {found[1] for word in words if (found := re.match(r"python -m hstu_dist ([a-z]+)", word))}
    assert ours <= COMMANDS_OF_THE_PACKAGE
    targets = {found[1] for word in words if (found := re.match(r"make ([a-z][a-z-]*)$", word))}
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_page_is_reached_from_the_index() -> None:
    index = DOCS / "README.md"
    reached = {(DOCS / link.partition("#")[0]).resolve() for link in links(index)}
    assert not [page.name for page in DOCS.glob("*.md") if page != index and page not in reached], (
        "name them in docs/README.md"
    )


def test_the_tour_names_every_room_in_the_order_of_imports() -> None:
    tour = re.search(r"^    errors → .*?\n\n", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    assert tour
    # explanations stand behind two blanks or more
    names = [re.split(r"\s{2,}", line.strip())[0] for line in tour[0].splitlines()]
    rooms = re.findall(r"\w+", " ".join(names))
    assert set(rooms) == set(LEVEL) and len(rooms) == len(LEVEL)
    assert [LEVEL[room] for room in rooms] == sorted(LEVEL[room] for room in rooms)


def test_the_reference_is_what_the_classes_say() -> None:
    assert reference.render() == reference.PAGE.read_text(), "run `make docs`"
    assert set(reference.EXITS) == set(ExitCode)


def test_tables_are_the_committed_results() -> None:
    checkout = Checkout(ROOT)
    assert embed(README, summary(checkout)) == README, "run `make report`"
    assert everything(checkout) == checkout.page.read_text(), "run `make report`"
