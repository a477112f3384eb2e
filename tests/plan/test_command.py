"""`plan` on the command line: the largest job, what it writes, and how it says no."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hstu_dist.__main__ import main
from hstu_dist.commands.plan import job_of, plan_run, settings_of
from hstu_dist.config import HARDWARE, compose, conf_dir, hardware_names
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.plan.config import PlanConfig
from hstu_dist.plan.memory import memory_of
from tests.tiny import NUM_ITEMS, tiny_overrides

LARGEST = ["experiment=hstu_1p5t", "cluster=h100x256"]


@pytest.mark.slow
def test_one_and_a_half_trillion_parameters_fit_on_256_h100(tmp_path: Path) -> None:
    lines: list[str] = []
    plan_run([*LARGEST, "plan.dataset_tokens=100000000000"], tmp_path, lines.append)
    written = json.loads((tmp_path / "hstu_1p5t-h100x256.json").read_text())
    assert written["parameters"] == pytest.approx(1.5e12, rel=1e-8)
    assert written["fits"] and written["memory"]["total"] <= written["memory"]["limit"] == 72e9
    assert written["memory"]["total"] == sum(v for k, v in written["memory"].items() if k not in ("total", "limit"))
    assert [entry["ranks"] for entry in written["sweep"]] == [2**n for n in range(3, 13)]
    assert next(e for e in written["sweep"] if e["ranks"] == 256)["bound"] == written["time"]["bound"]
    # days of the data set, by the tokens of a day
    days = written["gpu_days"]["bound"] / 256
    assert days * written["tokens_per_day"]["bound"] == pytest.approx(1e11)
    assert "1,500,000,001,024 parameters on 256 x H100 SXM" in lines[0] and "fits" in lines[0]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png", ".svg"}


@pytest.mark.slow
def test_it_needs_no_torch() -> None:
    code = (
        "import sys\nfrom hstu_dist.commands.plan import settings_of, job_of\nfrom hstu_dist.plan.report import Plan\n"
        "_, hardware, config = settings_of(sys.argv[1:])\n"
        "Plan.of('x', job_of(config), hardware, config.plan).document()\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *LARGEST], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("embedding.replicas=3", "embedding.replicas: got 3, expected a divisor of the 256 ranks"),
        ("trainer.parallel={kind: hsdp, shard_ranks: 7}", "shard_ranks: got 7"),
        ("trainer.micro_batches=64", "trainer.micro_batches: got 64, but a rank's share of a step has 1 sequences"),
    ],
)
def test_what_so_many_ranks_cannot_do_is_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        plan_run([*LARGEST, "trainer.global_batch_size=256", override], tmp_path, print)
    assert not list(tmp_path.iterdir())


def test_an_average_is_refused_where_a_launch_would_refuse_it(tmp_path: Path) -> None:
    words = ["embedding.dtype=fp32", "embedding.compute_kernel=fused_uvm", "optimizer.average_decay=0.999"]
    with pytest.raises(UserError, match="got compute_kernel=fused_uvm, expected fused with optimizer"):
        plan_run([*LARGEST, "trainer.global_batch_size=256", *words], tmp_path, print)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_plan_that_does_not_fit_is_shown_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", *LARGEST, "trainer.global_batch_size=1024", "--folder", str(tmp_path)])
    shown = capsys.readouterr()
    assert code == ExitCode.BAD_INPUT
    assert "DOES NOT FIT" in shown.out and "all-to-all" in shown.out
    assert shown.err.startswith("error: the plan does not fit: ") and shown.err.count("\n") == 2
    assert "mend: use trainer.global_batch_size=256" in shown.err
    assert not json.loads((tmp_path / "hstu_1p5t-h100x256.json").read_text())["fits"]


BAD = [
    (["experiment=hstu_1p5t"], "cluster: got nothing, expected one of a100x256, "),
    (["experiment=hstu_1p5t", "cluster=local"], "cluster: got local, expected one of a100x256, "),
    ([*LARGEST, "cluster/chip=x100"], "Could not find 'chip/x100'"),
    ([*LARGEST, "cluster.chip.name=X100"], "cluster: chip: peak_flops: got null for the unknown chip 'X100'"),
    ([*LARGEST, "cluster.ranks=12"], "cluster: ranks: got 12, expected a multiple of ranks_per_node (8)"),
    ([*LARGEST, "cluster.ranks=0"], "cluster: ranks: "),
    ([*LARGEST, "cluster.chip.memory_gb=-1"], "cluster: chip.memory_gb: "),
    ([*LARGEST, "cluster.fabric.gb_per_second=0"], "cluster: fabric.gb_per_second: "),
    ([*LARGEST, "cluster.nodes=3"], "configuration: nodes: no such key"),
    ([*LARGEST, "plan.num_items=0"], "plan.num_items: "),
    ([*LARGEST, "plan.precision=fp8"], "plan.precision: "),
    ([*LARGEST, "plan.mean_length=9000"], "plan.mean_length: got 9000, expected at most data.max_length (8192)"),
    (["experiment=ml1m", "cluster=h100x8", "data.path=nowhere"], "nowhere"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "problem"), BAD, ids=[" ".join(o) for o, _ in BAD])
def test_bad_input_is_one_line(
    overrides: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *overrides, "--folder", str(tmp_path)]) == ExitCode.BAD_INPUT
    shown = capsys.readouterr()
    assert shown.out == "" and list(tmp_path.iterdir()) == []
    assert problem in shown.err and shown.err.startswith("error: ") and shown.err.count("\n") <= 2


@pytest.mark.slow
@pytest.mark.parametrize("cluster", hardware_names())
@pytest.mark.parametrize("chip", [None, *sorted(f.stem for f in (conf_dir() / HARDWARE / "chip").glob("*.yaml"))])
def test_every_cluster_composes_with_every_chip(cluster: str, chip: str | None) -> None:
    chosen = [] if chip is None else [f"cluster/chip={chip}"]
    name, hardware, config = settings_of(["experiment=hstu_1p5t", f"cluster={cluster}", *chosen])
    assert (name, config.name) == (cluster, "hstu_1p5t")
    assert hardware.chip.peak("bfloat16") > hardware.chip.peak("tf32") > hardware.chip.peak("float32")


def test_a_prepared_data_set_says_how_many_items_there_are(tiny_data: Path, tmp_path: Path) -> None:
    config = compose(tiny_overrides(tiny_data, tmp_path))
    assert config.plan == PlanConfig()
    planned = job_of(config)
    assert planned.num_items == NUM_ITEMS
    assert memory_of(planned, 2).table == NUM_ITEMS // 2 * 8 * 4


@pytest.mark.slow
def test_batches_of_so_many_tokens_or_flops_hold_as_many_sequences_as_that_takes() -> None:
    def sequences(*overrides: str) -> int:
        return job_of(compose(["experiment=hstu_1p5t", *overrides])).global_batch_size

    assert sequences() == 256
    assert sequences("trainer.batching.by=tokens", "trainer.batching.budget=819200") == 100
    one = job_of(compose(["experiment=hstu_1p5t"])).flops(1).training
    assert sequences("trainer.batching.by=flops", f"trainer.batching.budget={3 * one}") == 3
