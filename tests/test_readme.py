"""README.md says what is true: its commands compose, its paths exist, its tables come from the result files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hstu_dist.commands.plan import settings_of
from hstu_dist.config import compose, compose_dict
from hstu_dist.report.pages import Checkout, embed, everything, summary

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block.strip().splitlines()]


@pytest.mark.parametrize("target", [c[1] for c in COMMANDS if c[0] == "make"])
def test_make_targets_expand(target: str) -> None:
    dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ".venv/bin/python" in dry.stdout or "up to date" in dry.stdout


def test_make_train_runs_the_commands_of_the_main_job() -> None:
    lines = subprocess.run(["make", "-n", "train"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    modules = [shlex.split(line)[2:] for line in lines.splitlines() if re.search(r"-m (hstu_dist|launch) ", line)]
    assert [m[0] for m in modules] == ["hstu_dist", "launch"]
    assert modules[0][1] == "prepare"
    compose_dict("prepare", modules[0][2:])
    config = compose(modules[1][1:])
    assert (config.nproc, config.data.path, config.model.kind) == (2, "data/ml1m", "hstu")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] != "make"], ids=" ".join)
def test_overrides_of_every_command_compose(command: list[str]) -> None:
    overrides = [word for word in command if re.fullmatch(r"[~a-z_.]+=\S*", word)]
    if "prepare" in command:
        compose_dict("prepare", overrides)
    elif "plan" in command:
        settings_of(overrides)
    else:
        compose([o for o in overrides if not o.startswith("dry_run=")])


def test_help_lists_every_command_with_a_line() -> None:
    helped = subprocess.run(
        [sys.executable, "-m", "hstu_dist", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for command in ("prepare", "train", "evaluate", "plan"):
        assert re.search(rf"^ +{command} +\w.+$", helped, re.MULTILINE)
        own = subprocess.run(
            [sys.executable, "-m", "hstu_dist", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert "key=value" in own and "data" in own
    assert re.search(r"^ +report +\w.+$", helped, re.MULTILINE)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(document: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / document).read_text())
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_tables_are_the_committed_results() -> None:
    checkout = Checkout(ROOT)
    assert embed(README, summary(checkout)) == README, "run `make report`"
    assert everything(checkout) == checkout.page.read_text(), "run `make report`"
