"""The Dockerfile, which no engine builds here, keeps its promises as text."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ("cpu", "cuda")


@dataclass
class Stage:
    """One FROM and what follows it, as (instruction, value) pairs."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def values(self, instruction: str) -> list[str]:
        return [value for name, value in self.steps if name == instruction]


def _stages() -> dict[str, Stage]:
    lines = [line for line in (ROOT / "docker/Dockerfile").read_text().splitlines() if not line.startswith("#")]
    stages: dict[str, Stage] = {}
    for step in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not step.strip():
            continue
        instruction, value = step.split(maxsplit=1)
        if instruction == "FROM":
            base, keyword, name = value.split()
            assert keyword == "AS"
            stages[name] = Stage(base)
        else:
            stages[name].steps.append((instruction, " ".join(value.split())))
    return stages


STAGES = _stages()


def _lineage(target: str) -> list[Stage]:
    """Stages of a target's image, first to last."""
    stage = STAGES[target]
    return [*(_lineage(stage.base) if stage.base in STAGES else []), stage]


def test_every_foreign_base_is_pinned_to_a_patch_release() -> None:
    foreign = {stage.base for stage in STAGES.values() if stage.base not in STAGES}
    assert len(foreign) == len(TARGETS)
    for base in foreign:
        assert re.fullmatch(r"[\w/]+:\d+\.\d+\.\d+-[\w.-]+", base), base


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_runs_as_an_ordinary_user_without_build_tools(target: str) -> None:
    lineage = _lineage(target)
    user = lineage[-1].values("USER")[-1]
    assert user.isdigit() and int(user) >= 10_000
    # nothing runs as root after the switch
    names = [name for name, _ in lineage[-1].steps]
    assert "RUN" not in names[names.index("USER") :]
    assert not any("g++" in run for stage in lineage for run in stage.values("RUN"))
    assert json.loads(lineage[-1].values("ENTRYPOINT")[0]) == ["python", "-m"]
    assert json.loads(lineage[-1].values("CMD")[0])[0] == "launch"


def test_nothing_comes_from_an_address_and_no_package_list_stays() -> None:
    for stage in STAGES.values():
        assert stage.values("ADD") == []
        for run in stage.values("RUN"):
            assert "://" not in run and "curl" not in run
            assert ("apt-get install" in run) == ("rm -rf /var/lib/apt/lists/*" in run)
            assert ("apt-get install" in run) == ("--no-install-recommends" in run)


@pytest.mark.parametrize("target", TARGETS)
def test_installs_by_the_recipe_of_the_makefile(target: str) -> None:
    wanted = {"cpu": ["./packaging/fbgemm-gpu-shim", ".[cpu]"], "cuda": [".[cuda]"]}[target]
    runs = [shlex.split(run) for run in STAGES[f"{target}-build"].values("RUN")]
    assert [run[3] for run in runs if run[:3] == ["pip", "install", "--no-cache-dir"]] == wanted
    makefile = (ROOT / "Makefile").read_text()
    assert "pip install --quiet ./packaging/fbgemm-gpu-shim" in makefile and "'.[$(EXTRA),dev]'" in makefile


def test_versions_agree_with_the_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    shim = tomllib.loads((ROOT / "packaging/fbgemm-gpu-shim/pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras["cpu"] == shim["dependencies"] == [f"fbgemm-gpu-cpu=={shim['version']}"]
    assert extras["cuda"] == [f"fbgemm-gpu=={shim['version']}"]
    oldest = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    pythons = re.findall(r"python:?(\d+)\.(\d+)", (ROOT / "docker/Dockerfile").read_text())
    assert len(pythons) >= 2 and all((int(major), int(minor)) >= oldest for major, minor in pythons)
    # versions of Python packages are written in pyproject.toml only
    assert "==" not in (ROOT / "docker/Dockerfile").read_text()
    # the CUDA that torch's own build was made for: a newer torch needs another base
    assert "torch==2.13.0" in project["dependencies"]
    assert STAGES["cuda-base"].base.startswith("nvidia/cuda:13.0.")


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_build_copies_exists_and_is_let_through(target: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    copied = {source for copy in STAGES[f"{target}-build"].values("COPY") for source in copy.split()[:-1]}
    for source in copied:
        assert (ROOT / source).exists() and f"!{source}" in ignore
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["packages"], *wheel["force-include"], "pyproject.toml", "README.md", "LICENSE"} <= copied
