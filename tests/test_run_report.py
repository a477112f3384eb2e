"""Run reports: one page that needs nothing else, shows what the run folder says, and takes anything as text."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hstu_dist.__main__ import main
from hstu_dist.commands.report import leave_report
from hstu_dist.config import RunConfig, compose, save
from hstu_dist.report.run_data import RunData
from hstu_dist.report.run_page import page
from tests.tiny import tiny_overrides

_VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Cells, figures and everything that would be fetched; fails where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.figures = 0
        self.fetched: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        self.figures += tag == "svg"
        if tag in ("td", "th"):
            self.cells.append("")
        names = dict(attrs)
        self.fetched += [str(names[key]) for key in ("src", "data") if key in names]
        self.fetched += [str(names["href"])] if tag == "link" else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def run_folder(folder: Path, data: Path, *overrides: str, finished: bool = True) -> Path:
    """What a run of 2 epochs leaves."""
    config = compose([*tiny_overrides(data, folder), *overrides])
    path = config.run_dir
    (path / "logs" / "ranks").mkdir(parents=True)
    save(config, path / "config.yaml")
    metrics = {"hr@10": 0.25, "ndcg@10": 0.125}
    lines = [{"step": step, "train/loss": 3.0 - step, "speed/mfu": 0.5} for step in (1, 2)]
    lines.append({"step": 2, "validation/ndcg@10": 0.5, "speed/imbalance": 0.25, "memory/peak_gib_per_rank": 1.5})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    later = {"date": "2026-02-01", "commit": "def", "machine": "Linux"}
    environment = {"commit": "abc", "versions": {"torch": "9.9"}, "continued": [later]}
    (path / "environment.json").write_text(json.dumps(environment))
    shards = [{"rank": rank, "row": 0, "column": 0, "rows": rows, "columns": 8} for rank, rows in ((0, 30), (1, 10))]
    table = {"rows": 40, "width": 8, "dtype": "fp32", "sharding": "row_wise", "compute_kernel": "fused"}
    plan = {"world_size": 2, "tables": {"item": {**table, "shards": shards}}}
    (path / "embedding_plan.json").write_text(json.dumps(plan))
    when = "2026-01-31 10:00:00,123"
    warning = f"{when} WARNING hstu_dist.x: disk is <nearly> full\n"
    log = f"{when} INFO hstu_dist: fine\n{warning}{warning}"
    (path / "logs" / "ranks" / "rank-0.log").write_text(log)
    if finished:
        speed = {"train_seconds": 8.0, "evaluation_seconds": 2.0, "training_flops": 1e9, "tokens_per_second": 1234.0}
        result = {
            "epochs": 2,
            "steps": 2,
            "test": metrics,
            "popularity": {"hr@10": 0.0625},
            "speed": {**speed, "mfu": 0.5},
        }
        (path / "result.json").write_text(json.dumps({**result, "world_size": 2, "dense_parameters": 777}))
    return path


@pytest.mark.slow
def test_the_page_shows_what_the_folder_says(tmp_path: Path, tiny_data: Path) -> None:
    shown = Page(page([RunData.read(run_folder(tmp_path, tiny_data))]))
    for text in (
        "0.2500",
        "0.0625",
        "1,234",
        "50.0%",
        "1.50",
        "777",
        "row_wise",
        "1.500",
        "9.9",
        "went on 2026-02-01",
        "commit def, Linux",
        "0.250",
        str(tiny_data),
    ):
        assert text in shown.cells, text
    place = shown.cells.index("warning: hstu_dist.x: disk is <nearly> full")
    assert shown.cells[place + 1] == "2" and "INFO" not in "".join(shown.cells)
    assert shown.figures == 3
    assert shown.fetched == []


@pytest.mark.slow
def test_an_unfinished_run_has_a_page(tmp_path: Path, tiny_data: Path) -> None:
    text = page([RunData.read(run_folder(tmp_path, tiny_data, finished=False))])
    assert "not finished, step 2" in text and Page(text).figures >= 2


@pytest.mark.slow
def test_a_run_whose_data_set_has_gone_has_a_page(tmp_path: Path, tiny_data: Path) -> None:
    data = shutil.copytree(tiny_data, tmp_path / "data")
    path = run_folder(tmp_path, data)
    shutil.rmtree(data)
    assert "users" not in Page(page([RunData.read(path)])).cells


@pytest.mark.slow
def test_settings_are_compared_with_the_experiment(tmp_path: Path, tiny_data: Path) -> None:
    path = run_folder(tmp_path, tiny_data, "experiment=ml1m", "data=events", "seed=7")
    assert RunData.read(path).config.experiment == "ml1m"
    cells = Page(page([RunData.read(path)])).cells
    place = cells.index("seed")
    assert cells[place + 1 : place + 3] == ["1", "7"]
    assert "experiment=ml1m" in cells and "loss.kind" not in cells


@pytest.mark.slow
def test_several_runs_stand_beside_each_other(tmp_path: Path, tiny_data: Path) -> None:
    runs = [run_folder(tmp_path, tiny_data, f"name=run{n}", f"seed={n}") for n in (1, 2, 3)]
    assert main(["report", *map(str, runs), "--output", str(tmp_path / "all.html")]) == 0
    shown = Page((tmp_path / "all.html").read_text())
    place = shown.cells.index("seed")
    assert shown.cells[place + 1 : place + 4] == ["1", "2", "3"]
    assert shown.cells.count("0.2500") == 3


@pytest.mark.slow
def test_what_a_name_holds_is_text(tmp_path: Path, tiny_data: Path) -> None:
    data = RunData.read(run_folder(tmp_path, tiny_data))
    bad: RunConfig = replace(data.config, output="<script>alert(1)</script>")
    assert "<script>" not in page([replace(data, config=bad, warnings={"<script>x</script>": 1})])


@pytest.mark.parametrize(("place", "problem"), [("nothing", "holds no run"), ("damaged", "cannot be read")])
def test_no_run_no_page(
    place: str, problem: str, tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder(tmp_path, tiny_data, "name=damaged")
    (path / "result.json").write_text("{")
    assert main(["report", str(tmp_path / place)]) == 2
    assert f"{tmp_path / place}: {problem}" in capsys.readouterr().err
    assert list(tmp_path.rglob("*.html")) == []


def test_a_run_does_not_fail_for_its_report(tmp_path: Path, tiny_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = run_folder(tmp_path, tiny_data)
    (path / "metrics.jsonl").write_text("{")
    said: list[str] = []
    leave_report(path, said.append)
    assert said == [] and "no report" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_it(tmp_path: Path, tiny_data: Path) -> None:
    path = run_folder(tmp_path, tiny_data)
    assert main(["report", str(path)]) == 0
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    target = (path / "report.html").as_uri()
    shown = subprocess.run([*command, "--dump-dom", target], capture_output=True, text=True, timeout=60, check=True)
    assert "disk is &lt;nearly&gt; full" in shown.stdout and shown.stdout.count("<svg") == 3
