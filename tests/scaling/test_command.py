"""`scale fit` and `scale plan` on the folders of a sweep, and every way in which a sweep can be unfit."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hstu_dist.__main__ import main
from hstu_dist.commands.scale_cells import training_compute
from hstu_dist.config import compose
from hstu_dist.data.identity import DataIdentity
from tests.scaling.cases import LAWS, SIZES, write_run, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder)
    return folder


@pytest.fixture
def copied(sweep: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sweep, tmp_path / "copy"))


def fitted(folder: Path, metric: str = "loss") -> dict[str, object]:
    assert main(["scale", "fit", str(folder), "--metric", metric]) == 0
    found: dict[str, object] = json.loads((folder / "fit" / f"{metric.replace('@', '_at_')}.json").read_text())
    return found


@pytest.mark.slow
def test_laws_are_found_and_the_largest_run_is_predicted(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = fitted(copied)
    for family in document["families"]:  # type: ignore[attr-defined]
        assert family["r_squared"] > 0.999
        assert family["held_out"]["runs"] == [f"{family['family']}_s06"]
        assert abs(family["held_out"]["error"]) < 1e-3
        assert family["parameters"]["E"] == pytest.approx(LAWS[family["family"]].floor, rel=0.01)
    table = pq.read_table(copied / "fit" / "loss.parquet").to_pydict()
    assert len(table["run"]) == len(LAWS) * len(SIZES) and min(table["test/loss"]) > 4.2
    for suffix in ("png", "svg", "md"):
        assert (copied / "fit" / f"loss.{suffix}").stat().st_size > 500
    assert "| scaling_hstu | E = 4.2" in capsys.readouterr().out


@pytest.mark.slow
def test_hit_rates_have_a_law_of_their_own(copied: Path) -> None:
    document = fitted(copied, "hr@10")
    assert [family["law"] for family in document["families"]] == ["logarithm"] * 2  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_target_becomes_compute_a_model_and_gpu_days(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted(copied)
    capsys.readouterr()
    assert main(["scale", "plan", str(copied), "cluster=h100x8", "--target-loss", "4.25"]) == 0
    shown = capsys.readouterr().out
    needed = float(re.search(r"scaling_hstu: loss 4.25 takes (\S+) FLOPs", shown)[1])  # type: ignore[index]
    assert needed == pytest.approx(LAWS["scaling_hstu"].compute_for(4.25), rel=0.3)
    assert "scaling_sasrec: never reaches loss 4.25, its law ends at 4.3" in shown
    assert "at least" in shown and "GPU-days on 8 x H100 SXM (h100x8)" in shown and "size=s" in shown
    assert main(["scale", "plan", str(copied), "cluster=h100x8", "--target-loss", "3"]) == 2
    assert "no family reaches it" in capsys.readouterr().err


@pytest.mark.slow
def test_too_few_finished_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size in SIZES[:3]:
        write_run(tmp_path, "scaling_hstu", size)
    assert main(["scale", "fit", str(tmp_path)]) == 2
    assert "got 3 finished cells with loss, expected at least 4" in capsys.readouterr().err
    assert not (tmp_path / "fit").exists()
    assert main(["scale", "fit", str(tmp_path / "nowhere")]) == 2
    assert "got no runs" in capsys.readouterr().err


@pytest.mark.slow
def test_seeds_that_drew_differently_are_one_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As with Stochastic Length or emission: a second seed of each cell trains on one percent more."""
    sizes = SIZES[:3]
    for size in sizes:
        compute = training_compute(write_run(tmp_path, "scaling_hstu", size))
        assert compute is not None
        speed = {"training_flops": 1.01 * compute, "tokens_per_second": 1000.0, "train_seconds": 50.0}
        words = ["seed=2", f"name=scaling_hstu_{size}_seed2"]
        write_run(tmp_path, "scaling_hstu", size, words=words, speed=speed)
    assert main(["scale", "fit", str(tmp_path)]) == 2
    assert "has 3 sizes, expected at least 4" in capsys.readouterr().err
    for size in SIZES[3:]:
        write_run(tmp_path, "scaling_hstu", size)
    write_run(tmp_path, "scaling_hstu", SIZES[-1], words=["seed=2", "name=last_seed2"])
    (family,) = fitted(tmp_path)["families"]  # type: ignore[misc]
    assert sorted(family["held_out"]["runs"]) == ["last_seed2", f"scaling_hstu_{SIZES[-1]}"]


@pytest.mark.slow
def test_a_plan_is_for_the_settings_that_it_is_given(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted(copied)
    for more in ([], ["task.records.train=400000"]):
        capsys.readouterr()
        assert main(["scale", "plan", str(copied), "cluster=h100x8", *more, "--target-loss", "4.31"]) == 0
        shown = capsys.readouterr().out
        (tokens,) = re.findall(r"parameters, (\S+) tokens", shown.split("scaling_sasrec")[0])
        (size,) = re.findall(r"size=(s\d\d)", shown.split("scaling_sasrec")[0])
        rung = training_compute(compose(["experiment=scaling_hstu", f"size={size}", *more]))
        needed = float(re.search(r"scaling_hstu: loss 4.31 takes (\S+) FLOPs", shown)[1])  # type: ignore[index]
        records = compose(["experiment=scaling_hstu", f"size={size}", *more])
        assert rung is not None
        assert records.record_split is not None
        assert records.record_split.train is not None
        trained = records.record_split.train * records.data.max_length
        assert float(tokens) == pytest.approx(trained * needed / rung, rel=0.02)


@pytest.mark.slow
def test_data_prepared_from_another_log_does_not_mix(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run, made_from in (("scaling_hstu_s01", "sha256:a"), ("scaling_hstu_s02", "sha256:a")):
        record = DataIdentity(files={}, made_from=made_from, values={})
        (copied / run / "data.json").write_bytes(record.to_json())
    # others left no record
    fitted(copied)
    other = DataIdentity(files={}, made_from="sha256:b", values={})
    (copied / "scaling_hstu_s02" / "data.json").write_bytes(other.to_json())
    assert main(["scale", "fit", str(copied)]) == 2
    assert "scaling_hstu_s01 and scaling_hstu_s02 were trained on different data sets" in capsys.readouterr().err


@pytest.mark.slow
def test_data_sets_do_not_mix(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(copied, "scaling_hstu", "s07", words=["data.num_items=3000"])
    (copied / "cells.json").unlink()
    assert main(["scale", "fit", str(copied)]) == 2
    error = capsys.readouterr().err
    assert "were trained on different data sets" in error and config.name in error


@pytest.mark.slow
def test_what_is_left_out_is_said(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(copied, "scaling_hstu", "s03", test={"loss": float("nan"), "hr@10": 0.1})
    write_run(copied, "scaling_hstu", "s02", words=["name=another"])
    unfinished = write_run(copied, "scaling_hstu", "s07")
    (copied / unfinished.name / "result.json").unlink()
    changed = copied / "scaling_sasrec_s02" / "config.yaml"
    changed.write_text(changed.read_text().replace("learning_rate: 0.01", "learning_rate: 0.5"))
    excluded = "\n".join(fitted(copied)["excluded"])  # type: ignore[arg-type]
    assert "scaling_hstu_s03: excluded, its loss is nan" in excluded
    assert re.search(r"(another|scaling_hstu_s02): excluded, repeats (scaling_hstu_s02|another)", excluded)
    assert "scaling_hstu_s07: excluded, has not finished" in excluded
    assert "scaling_sasrec_s02: excluded, its settings were changed under the result" in excluded
    assert "optimizer.learning_rate: 0.5 -> 0.01" in excluded
    assert all(line in (copied / "fit" / "loss.md").read_text() for line in excluded.splitlines())
    assert excluded.splitlines()[0] in capsys.readouterr().out


@pytest.mark.slow
def test_mistakes_of_the_command(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        (["fit", str(sweep), "seed=1"], "scale fit: got seed=1"),
        (["fit", str(sweep), "--target", "3"], "plan needs a value to reach"),
        (["plan", str(sweep)], "plan needs a value to reach"),
        (["plan", str(sweep / "x"), "cluster=h100x8", "--target", "3"], "fit it first"),
        (["fit", str(sweep), "--metric", "hr@7"], "got 0 finished cells with hr@7"),
    ):
        assert main(["scale", *words]) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_an_iso_flop_sweep_gives_optima_and_a_picture_where_it_has_no_law(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three budgets; in each the loss is a parabola over the logarithm of the size, least at the middle model."""
    widths = {"iso_a": 24, "iso_b": 32, "iso_c": 48}
    for budget, best in widths.items():
        for width in (best // 2, best, 2 * best):
            distance = math.log(width / best)
            words = [f"size={budget}3", f"model.width={width}", f"name={budget}_{width}"]
            speed = {"training_flops": {"iso_a": 1e11, "iso_b": 4e11, "iso_c": 1.6e12}[budget], "train_seconds": 10.0}
            speed["tokens_per_second"] = speed["training_flops"] / (60 * width**2)
            test = {"loss": 5.0 + distance**2}
            write_run(tmp_path, "scaling_hstu", f"{budget}3", words=words, speed=speed, test=test)
    assert main(["scale", "fit", str(tmp_path)]) == 0
    (family,) = json.loads((tmp_path / "fit" / "loss.json").read_text())["families"]
    assert family["law"] is None and family["held_out"] is None
    for optimum, width in zip(family["optima"], widths.values(), strict=True):
        assert optimum["inside"]
        assert optimum["parameters"] == pytest.approx(10 * width**2)
        assert optimum["loss"] == pytest.approx(5.0)
    assert family["growth"]["parameters"] + family["growth"]["tokens"] == pytest.approx(1)
    assert "none: 3 budgets, 4 are needed" in capsys.readouterr().out
    assert (tmp_path / "fit" / "loss_by_size.svg").stat().st_size > 500
    assert not (tmp_path / "fit" / "loss.svg").exists()
    assert main(["scale", "plan", str(tmp_path), "cluster=h100x8", "--target-loss", "4.9"]) == 2
    assert "loss.json: holds no law" in capsys.readouterr().err
