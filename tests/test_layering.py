"""Imports go one way only: read from the source with ast, so that lazy imports count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hstu_dist"

# a room may import rooms of earlier lines; rooms of one line do not know each other
LINES = [
    {"errors"},
    {"validation", "batch", "machine", "files", "actions"},
    {"console", "plugins"},
    {"ops"},
    {"cluster", "data", "models", "losses", "metrics"},
    {"distributed"},
    {"checkpoint"},
    {"train", "plan", "inference", "scaling"},
    {"config"},
    {"run_folder"},
    {"preflight", "report", "doctor"},
    {"commands"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LINES) for room in rooms}

WITHOUT_TORCH = [
    "hstu_dist.cluster",
    "hstu_dist.checkpoint.manifest",
    "hstu_dist.commands.checkpoint",
    "hstu_dist.commands.doctor",
    "hstu_dist.doctor.machine",
    "hstu_dist.doctor.packages",
    "hstu_dist.config",
    "hstu_dist.preflight",
    "hstu_dist.run_folder",
    "hstu_dist.commands.prepare",
    "hstu_dist.commands.plan",
    "hstu_dist.commands.report",
    "hstu_dist.commands.scale",
    "hstu_dist.scaling.study",
    "hstu_dist.report.pages",
    "hstu_dist.__main__",
    "hstu_dist.machine",
    "hstu_dist.models.activations",
    "hstu_dist.models.flops",
    "hstu_dist.models.ranking_flops",
    "hstu_dist.actions",
    *(f"hstu_dist.{file.parent.name}.config" for file in sorted(PACKAGE.glob("*/config.py"))),
    # of data, only the loader and what it gives know tensors
    *(f"hstu_dist.data.{file.stem}" for file in sorted((PACKAGE / "data").glob("*.py")) if file.stem != "loader"),
    *(f"hstu_dist.data.stream.{f.stem}" for f in sorted((PACKAGE / "data/stream").glob("*.py")) if f.stem != "loader"),
]


@cache
def imports_of(file: Path) -> tuple[str, ...]:
    """Absolute names of everything that a file imports; `from a import b` counts as a.b."""
    return tuple(_imports(file))


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def room_of(file: Path) -> str:
    """The first part of a module's name below hstu_dist."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_its_place() -> None:
    rooms = {room_of(file) for file in python_files("hstu_dist")} - {"__init__"}
    assert rooms == set(LEVEL)


@pytest.mark.slow
@pytest.mark.parametrize("file", python_files("hstu_dist"), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    own = room_of(file)
    for name in imports_of(file):
        parts = name.split(".")
        assert parts[0] not in ("benchmarks", "launch", "tests"), f"{file.name} imports {name}"
        # `import hstu_dist` and `from hstu_dist import __version__` name no room
        if parts[0] != "hstu_dist" or own == "__init__" or len(parts) == 1 or parts[1] in ("__version__", own):
            continue
        other = parts[1]
        assert LEVEL[other] < LEVEL[own], f"{own} ({file.name}) imports {name}"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("triton", {"ops/triton"}),
        ("omegaconf", {"config.py"}),
        ("hydra", {"config.py"}),
        ("torchrec", {"distributed", "models/dlrm.py"}),
        ("wandb", {"train/metrics_log.py"}),
        ("pyarrow", {"data", "scaling/table.py"}),
        ("scipy", {"scaling/law.py"}),
        ("duckdb", {"data/duckdb_engine.py"}),
        ("pyspark", {"data/spark_engine.py"}),
        ("xxhash", {"checkpoint"}),
        ("matplotlib", {"report/plots.py", "report/run_plots.py", "report/scaling_plots.py"}),
        ("jinja2", {"report/run_page.py"}),
        ("faiss", {"inference/hnsw.py"}),
        ("aiohttp", {"inference/server.py"}),
        ("prometheus_client", {"inference/server.py", "inference/server_metrics.py"}),
    ],
)
def test_a_library_has_one_home(library: str, allowed: set[str]) -> None:
    homes = {
        str(file.relative_to(PACKAGE))
        for file in python_files("hstu_dist")
        if any(name.split(".")[0] == library for name in imports_of(file))
    }
    assert homes
    assert {home for home in homes if not any(home == a or home.startswith(f"{a}/") for a in allowed)} == set()


def test_launch_runs_on_a_login_node() -> None:
    for file in (*python_files("launch"), *python_files("hydra_plugins")):
        heavy = {name for name in imports_of(file) if name.split(".")[0] in ("torch", "torchrec", "triton")}
        assert not heavy, f"{file} imports {heavy}"


@pytest.mark.slow
def test_configuration_and_data_import_without_torch() -> None:
    launch = [str(f.relative_to(ROOT).with_suffix("")).replace("/", ".") for f in python_files("launch")]
    modules = [*WITHOUT_TORCH, *(m.removesuffix(".__init__") for m in launch if not m.endswith("__main__"))]
    assert "hstu_dist.train.config" in modules
    # one process for all: the first that brings torch in is named
    check = "importlib.import_module(name); 'torch' in sys.modules and sys.exit(name)"
    code = f"import importlib, sys\nfor name in sys.argv[1:]: {check}"
    result = subprocess.run(
        [sys.executable, "-c", code, *modules], capture_output=True, text=True, check=False, timeout=120, cwd=ROOT
    )
    assert result.returncode == 0, f"{result.stderr.strip()} imports torch"
