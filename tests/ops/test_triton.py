"""The Triton backend: parity in Triton's interpreter, tile tables, and what it says where it cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from hstu_dist.errors import UserError
from hstu_dist.ops.spec import Backend, JaggedLayout
from tests.ops.cases import CASES, Case, Problem, assert_as_exact_as_eager, assert_close_to_reference, problem
from tests.ops.triton_checks import MORE_NAMES, NAMES

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
PLAIN = next(case for case in CASES if case.name == "no-bias")


def python(*arguments: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def interpret(names: Sequence[str]) -> dict[str, str]:
    """What is wrong with each check, in one process that interprets."""
    lines = python("-m", "tests.ops.triton_worker", *names, TRITON_INTERPRET="1").splitlines()
    return {line["check"]: line["problem"] for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    return interpret(NAMES)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_in_the_interpreter(interpreted: dict[str, str], name: str) -> None:
    assert interpreted[name] == ""


@pytest.mark.long
def test_more_in_the_interpreter() -> None:
    assert interpret(MORE_NAMES) == dict.fromkeys(MORE_NAMES, "")


@pytest.mark.slow
def test_the_door_does_not_load_triton() -> None:
    loaded = python("-c", "import hstu_dist.ops.attention, sys; print('triton' in sys.modules)")
    assert loaded.strip() == "False"


def test_without_a_gpu_says_so() -> None:
    with pytest.raises(UserError, match="got tensors on cpu, expected a GPU"):
        assert_as_exact_as_eager(Backend.TRITON, torch.float32, PLAIN)


def test_float64_is_refused() -> None:
    with pytest.raises(UserError, match=r"got torch\.float64"):
        assert_as_exact_as_eager(Backend.TRITON, torch.float64, PLAIN)


def on_device(p: Problem, device: torch.device) -> Problem:
    fields = ("offsets", "key_offsets", "num_contextual", "num_targets")
    moved = (getattr(p.layout, name) for name in fields)
    return Problem(
        p.case,
        JaggedLayout(*(x if x is None else x.to(device) for x in moved)),
        {name: x.to(device) for name, x in p.leaves.items()},
        *(x.to(device) for x in (p.query_times, p.key_times, p.grad_out)),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    p = on_device(problem(case), torch.device("cuda"))
    assert_close_to_reference(p, p.run(Backend.TRITON, dtype), dtype)


def test_table_survives_a_file(tmp_path: Path) -> None:
    from hstu_dist.ops.triton import configs

    table = configs.default_table()
    configs.write_table(tmp_path / "table.json", table)
    assert configs.read_table(tmp_path / "table.json") == table
    assert (tmp_path / "table.json").read_text() == configs.TABLE_PATH.read_text()


def test_a_broken_table_is_refused(tmp_path: Path) -> None:
    from hstu_dist.ops.triton import configs

    path = tmp_path / "table.json"
    for text in (
        "{",
        '{"sm_90": {"forward": {"64": [[1, 2, 3]]}}}',
        '{"sm_90": {"forward": {"64": [[48, 64, 4, 2]]}}}',
    ):
        path.write_text(text)
        with pytest.raises(UserError, match="not a table of kernel configs"):
            configs.read_table(path)


def test_choice_of_tiles() -> None:
    from hstu_dist.ops.triton import configs
    from hstu_dist.ops.triton.configs import Architecture, Config, Kernel, Key

    narrow, wide, single = (Config(n, n, 4, 1) for n in (16, 32, 64))
    key = Key(Architecture.SM_90, Kernel.FORWARD, 64, False)
    ragged = Config(32, 16, 4, 1)
    table = {key: narrow, key._replace(width=128): wide, key._replace(width=0): single, key._replace(width=63): ragged}
    assert configs.choose(key._replace(width=16), table) is narrow
    assert configs.choose(key, table) is narrow
    assert configs.choose(key._replace(width=31), table) is ragged
    assert configs.choose(key._replace(width=65), table) is wide
    assert configs.choose(key._replace(width=0), table) is single
    with pytest.raises(UserError, match="head width: got 256, expected at most 128"):
        configs.choose(key._replace(width=256), table)


def test_every_chip_has_a_complete_table() -> None:
    from hstu_dist.ops.triton import configs
    from hstu_dist.ops.triton.configs import Architecture, Kernel

    table = configs.default_table()
    for architecture in Architecture:
        for kernel in set(Kernel) - {Kernel.FAR}:
            for biased in (False, True):
                widths = {
                    k.width for k in table if (k.architecture, k.kernel, k.biased) == (architecture, kernel, biased)
                }
                assert 0 in widths and max(widths) >= 256, (architecture, kernel, biased)
    assert all(config.queries == config.keys for key, config in table.items() if key.kernel is Kernel.BIAS)
