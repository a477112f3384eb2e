"""Parts of a run from modules of the user's own: an example of each trains; nothing that is not listed is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.own_parts import Gru, bpr
from hstu_dist.__main__ import main
from hstu_dist.config import RunConfig, compose
from hstu_dist.errors import UserError
from hstu_dist.losses.config import PluginLossConfig
from hstu_dist.losses.plugin import score_loss
from hstu_dist.losses.softmax import Candidates
from hstu_dist.models.config import PluginEncoderConfig
from hstu_dist.models.flops import Workload, count_flops
from hstu_dist.ops.normalize import unit_rows
from hstu_dist.plugins import find
from tests.tiny import tiny_overrides

ROOT = Path(__file__).parents[1]
LISTED = "plugins=[examples.own_parts]"
DATA = ["data=plugin", "data.target=examples.own_parts:Walks", "data.settings={users: 200, items: 40}"]


def everything(folder: Path) -> list[str]:
    """Overrides of a run that takes all of its parts from the example."""
    own = [
        LISTED,
        *DATA,
        f"data.path={folder / 'walks'}",
        "model=plugin",
        "model.target=examples.own_parts:Gru",
        "model.settings={hidden: 16}",
        "model.width=16",
        "loss=plugin",
        "loss.target=examples.own_parts:bpr",
        "loss.settings={margin: 0.5}",
        "loss.num_negatives=8",
        "trainer.evaluation.metrics={rlr: 'examples.own_parts:reciprocal_log_rank'}",
        "trainer.evaluation.monitor=rlr",
        "trainer.hooks=[{target: 'examples.own_parts:WeightNorm'}]",
        "trainer.epochs=6",
        "optimizer.learning_rate=0.01",
        "embedding.optimizer.learning_rate=0.01",
    ]
    rest = tiny_overrides(folder / "walks", folder / "runs")
    taken = {word.partition("=")[0] for word in own}
    return [*own, *(word for word in rest if word.partition("=")[0] not in taken)]


@pytest.mark.distributed
def test_a_run_of_own_parts_on_two_ranks(tmp_path: Path) -> None:
    assert main(["prepare", LISTED, *DATA, f"data.path={tmp_path / 'walks'}"]) == 0
    command = [sys.executable, "-m", "launch", *everything(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny"
    result = json.loads((run / "result.json").read_text())
    assert result["test"]["rlr"] > 1.3 * result["popularity"]["rlr"] > 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("own/weight_norm" in line for line in lines) == 6
    assert all("validation/rlr" in line for line in lines if "validation/hr@10" in line)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("model=plugin", "model.target=os:system"),
        ("loss=plugin", "loss.target=os:system"),
        ("data=plugin", "data.target=os:system"),
        ("trainer.evaluation.metrics={x: 'os:system'}",),
        ("trainer.hooks=[{target: 'os:system'}]",),
    ],
)
def test_a_module_that_is_not_listed_is_refused(overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"plugins: got none, expected os among them"):
        compose(["experiment=ml1m", *overrides])


@pytest.mark.slow
def test_what_is_not_listed_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "trap.py").write_text("open('sprung', 'w')\n")
    command = [sys.executable, "-m", "hstu_dist", "train", "experiment=ml1m", "model=plugin", "model.target=trap:Model"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "expected trap among them" in done.stderr
    assert not (tmp_path / "sprung").exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["os", "os:", ":system", "os.:x", "os:a.b", "os:system()", "../os:system"])
def test_a_target_is_a_module_and_a_name(target: str) -> None:
    with pytest.raises(UserError, match=r"model.target: String should match pattern"):
        compose(["experiment=ml1m", "model=plugin", f"model.target='{target}'", "plugins=[os]"])


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("examples.nothing:X", "no module examples.nothing"),
        ("examples.own_parts:Nothing", "module examples.own_parts has no Nothing"),
        ("tests.broken_plugin:X", "importing tests.broken_plugin failed with ZeroDivisionError"),
    ],
)
def test_a_target_that_is_not_there_is_named(target: str, problem: str) -> None:
    with pytest.raises(UserError) as error:
        find(target)
    assert problem in error.value.problem


@pytest.mark.parametrize("settings", ["{}", "{users: 60, items: 40, colour: red}"])
def test_settings_that_do_not_fit_are_named(settings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data=plugin", "data.target=examples.own_parts:Walks", f"data.settings={settings}"]
    assert main(["prepare", LISTED, *words, f"data.path={tmp_path / 'walks'}"]) == 2
    assert "examples.own_parts:Walks: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_metric_does_not_hide_another() -> None:
    with pytest.raises(UserError, match=r"metrics: got hr@10, expected another name"):
        compose(["experiment=ml1m", LISTED, "trainer.evaluation.metrics={hr@10: 'examples.own_parts:bpr'}"])


def test_an_encoder_must_count_its_flops() -> None:
    config = PluginEncoderConfig(target="examples.own_parts:bpr")
    with pytest.raises(UserError, match=r"got no flops\(config, work\)"):
        count_flops(config, Workload.causal([3]), 1)


def test_a_plan_of_unknown_parts_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "model=plugin",
        "model.target=examples.own_parts:Gru",
        LISTED,
        "plan.num_items=1000",
        "plan.mean_length=10",
    ]
    assert main(["plan", "experiment=ml1m", *words, "cluster=h100x8"]) == 2
    assert "model, loss: got plugin" in capsys.readouterr().err


def test_flops_are_the_users_own() -> None:
    config: RunConfig = compose(
        [
            "experiment=ml1m",
            "model=plugin",
            "model.target=examples.own_parts:Gru",
            "model.settings={hidden: 16}",
            LISTED,
        ]
    )
    model, _ = config.retrieval
    assert isinstance(model, PluginEncoderConfig)
    work = Workload.causal([5, 7])
    assert count_flops(model, work, 0).forward == Gru.flops(model, work)


@pytest.mark.parametrize("tokens", [0, 1, 63])
def test_a_loss_sees_scores_of_positives_and_negatives(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu_dist.losses.plugin._ELEMENTS_AT_ONCE", 200)
    random = torch.Generator().manual_seed(tokens)
    table = torch.randn(11, 4, generator=random, dtype=torch.float64, requires_grad=True)
    queries = unit_rows(torch.randn(tokens, 4, generator=random, dtype=torch.float64)).requires_grad_()
    positive = torch.randint(11, (tokens,), generator=random)
    negative = torch.randint(11, (tokens, 5), generator=random)
    config = PluginLossConfig(target="examples.own_parts:bpr", settings={"margin": 0.5}, num_negatives=5)
    got = score_loss(config)(queries, Candidates(table, positive, negative))
    scores = queries @ unit_rows(table).T / config.temperature
    masked = scores.gather(1, negative).masked_fill(negative == positive[:, None], -5e4)
    expected = bpr(scores.gather(1, positive[:, None])[:, 0], masked, margin=0.5).sum()
    assert torch.allclose(got, expected, rtol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, (queries, table)), torch.autograd.grad(expected, (queries, table)), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
