"""An exported tower gives what the run gives, in an interpreter that has torch and nothing of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

from hstu_dist.__main__ import main
from hstu_dist.commands.trained import load_trained, run_of
from hstu_dist.errors import UserError
from hstu_dist.inference.config import ModelUse
from hstu_dist.inference.dense import DenseTower
from hstu_dist.inference.export import Bounds, exported, write_package
from hstu_dist.inference.mfalcon import Scorer
from hstu_dist.inference.requests import Requests
from hstu_dist.models.tower import Tower
from tests.inference.cases import MAX_LENGTH, VARIANTS, candidates_of, encoder_of, history_of

LENGTHS, M = (0, 1, 63, 7, 71, 5), 9
TOLERANCE = 1e-5


def padded(values: Tensor, offsets: Tensor, fill: float) -> Tensor:
    lengths = offsets.diff().tolist()
    out = torch.full((len(lengths), max(lengths), *values.shape[1:]), fill, dtype=values.dtype)
    for user, length in enumerate(lengths):
        out[user, :length] = values[int(offsets[user]) : int(offsets[user]) + length]
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_padded_batches_equal_jagged_ones(name: str) -> None:
    encoder = encoder_of(replace(VARIANTS[name], backend="reference"))
    history = history_of(LENGTHS)
    candidates = candidates_of((M,) * len(LENGTHS), history)
    expected = Scorer(encoder).score(history, candidates)
    tower = encoder.encode
    assert isinstance(tower, Tower)
    vectors = encoder.embed(candidates.tokens).view(len(LENGTHS), M, -1)
    for fill in (0.0, 7.0):
        inputs = (
            padded(encoder.embed(history.tokens), history.offsets, fill),
            padded(history.key_times, history.offsets, fill),
            torch.tensor(LENGTHS),
            candidates.times,
            vectors,
        )
        with torch.no_grad():
            outputs, users = DenseTower(tower, target_aware=True)(*inputs)
            scores, same = DenseTower(tower, target_aware=False)(*inputs)
        assert torch.allclose(outputs.flatten(0, 1), expected.candidates, rtol=0, atol=TOLERANCE)
        assert torch.allclose(users, expected.last, rtol=0, atol=TOLERANCE)
        assert torch.allclose(same, expected.last, rtol=0, atol=TOLERANCE)
        cosines = torch.cosine_similarity(vectors, expected.last[:, None], dim=2)
        assert torch.allclose(scores, cosines, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("target_aware", [False, True])
def test_graph_is_dynamic_and_has_no_operator_of_ours(target_aware: bool) -> None:
    encoder = encoder_of(replace(VARIANTS["paper"], backend="blocked"))
    tower = encoder.encode
    assert isinstance(tower, Tower)
    program = exported(tower, Bounds(users=64, history=MAX_LENGTH - 1, candidates=1024), target_aware)
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [name for name in operators if not name.startswith(("aten.", "<built-in function"))]
    dense = DenseTower(tower, target_aware)
    for users, history, candidates in ((1, 1, 1), (3, 1, 2), (3, 71, 2), (1, 30, 200), (64, 2, 1)):
        inputs = (
            torch.randn(users, history, 12),
            torch.randint(0, 2**33, (users, history)).sort().values,
            torch.randint(0, history + 1, (users,)),
            torch.full((users,), 2**33),
            torch.randn(users, candidates, 12),
        )
        with torch.no_grad():
            for got, want in zip(program.module()(*inputs), dense(*inputs), strict=True):
                assert torch.allclose(got, want, rtol=0, atol=TOLERANCE)


_ALONE = """
import json, sys
import torch
from torch._inductor import aoti_load_package
assert not [name for name in sys.modules if name.startswith(("hstu_dist", "torchrec", "fbgemm"))]
folder, source, target, compiled = sys.argv[1:]
inputs = torch.load(source)
models = [torch.export.load(f"{folder}/exported.pt2").module()]
if compiled == "true":
    models.append(aoti_load_package(f"{folder}/compiled.pt2"))
with torch.no_grad():
    torch.save([[f(*x) for x in inputs] for f in models], target)
assert not [name for name in sys.modules if name.startswith(("hstu_dist", "torchrec", "fbgemm"))]
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    "compiled",
    [
        pytest.param("false", marks=pytest.mark.slow),
        # the C++ compiler takes most of a minute
        pytest.param("true", marks=[pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
def test_a_fresh_interpreter_with_torch_alone_scores(compiled: str, tiny_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "package"
    assert main(["export", str(tiny_run), f"output={folder}", f"compile={compiled}"]) == 0
    description = json.loads((folder / "model.json").read_text())
    table = load_file(folder / "items.safetensors")["item_table.weight"]
    row = {raw: place for place, raw in enumerate(description["items"])}
    asks = [([1, 2, 3, 4, 5], [6, 7, 6]), ([9], [1])]
    inputs = []
    for items, wanted in asks:
        vectors, candidates = (table[[row[raw] for raw in ids]][None] for ids in (items, wanted))
        times = torch.arange(0, 1000 * len(items), 1000)[None]
        inputs.append((vectors, times, torch.tensor([len(items)]), torch.tensor([10**6]), candidates))
    torch.save(inputs, tmp_path / "inputs.pt")
    words = [str(path) for path in (folder, tmp_path / "inputs.pt", tmp_path / "out.pt")]
    command = [sys.executable, "-I", "-c", _ALONE, *words, compiled]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    trained = load_trained(*run_of(tiny_run, ()), ModelUse(device="cpu"))
    found = torch.load(tmp_path / "out.pt")
    assert len(found) == 1 + (compiled == "true")
    for answers in found:
        for (items, wanted), (scores, users) in zip(asks, answers, strict=True):
            requests = Requests(
                offsets=np.array([0, len(items)]),
                item_ids=trained.inputs.items.encode(items),
                timestamps=np.arange(0, 1000 * len(items), 1000),
                actions=np.zeros(len(items), dtype=np.int64),
                candidate_offsets=np.array([0, len(wanted)]),
                candidate_ids=trained.inputs.items.encode(wanted),
                times=np.array([10**6]),
            )
            expected = trained.model.score(requests, 1024)["scores"]
            assert scores[0].tolist() == pytest.approx(expected.tolist(), abs=TOLERANCE)
            assert users.norm(dim=1).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.distributed
def test_what_cannot_be_exported_leaves_nothing(tiny_run: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").touch()
    assert main(["export", str(tiny_run), f"output={tmp_path / 'taken'}", "compile=false"]) == 2
    assert "taken: holds precious, which no export writes" in capsys.readouterr().err
    assert main(["export", str(tmp_path), f"output={tmp_path / 'new'}"]) == 2
    assert "got no config.yaml" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return torch.export.export(torch.nn.ReLU(), (torch.ones(2),))


FILES = ["exported.pt2", "items.safetensors", "model.json"]


@pytest.mark.parametrize("former", [[], [*FILES, "compiled.pt2"], ["exported.pt2", ".unfinished/model.json"]], ids=str)
def test_a_folder_that_may_be_mounted_is_filled_where_it_is(
    former: list[str], program: ExportedProgram, tmp_path: Path
) -> None:
    folder = tmp_path / "package"
    (folder / ".unfinished").mkdir(parents=True)
    for name in former:
        (folder / name).write_text("former")
    place = folder.stat().st_ino
    with pytest.raises(TypeError):
        write_package(folder, program, torch.ones(2, 3), {"no JSON": object()}, compile_it=False)
    assert {name for name in former if "/" not in name} == {path.name for path in folder.iterdir()}
    write_package(folder, program, torch.ones(2, 3), {"step": 7}, compile_it=False)
    assert sorted(path.name for path in folder.iterdir()) == FILES and folder.stat().st_ino == place
    assert json.loads((folder / "model.json").read_text())["step"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_a_folder_with_more_than_a_package_is_left_alone(program: ExportedProgram, tmp_path: Path) -> None:
    for name in (*FILES, "precious"):
        (tmp_path / name).write_text("former")
    with pytest.raises(UserError, match="holds precious, which no export writes"):
        write_package(tmp_path, program, torch.ones(2, 3), {}, compile_it=False)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"former"}
