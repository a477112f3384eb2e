"""The campaign counts what it saw, refuses a run that trained on anything twice or not at all, and strikes for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import faults
from benchmarks.__main__ import main
from benchmarks.fault_kinds import KINDS
from benchmarks.fault_run import BATCH, EPOCHS, USERS, FaultyRun, Seen, prepared_data, trained_once
from benchmarks.faults import Outcome, forget_other_code, ratios_of, rows_of
from benchmarks.launch import overheads, ratio_of
from benchmarks.launch import rows_of as launch_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_data(tmp_path_factory.mktemp("faults"))


def log_of(path: Path, steps: int) -> None:
    # a resumed run replaces the file
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, steps + 1)))
    temporary.replace(path)


def test_a_restart_is_seen_with_the_steps_that_it_repeats(tmp_path: Path) -> None:
    log, seen = tmp_path / "metrics.jsonl", Seen()
    seen.look(log, None)
    log_of(log, 13)
    seen.look(log, None)
    assert (seen.last_step, seen.restarts) == (13, 0)
    with log.open("a") as file:
        file.write(json.dumps({"step": 14}) + '\n{"step": 15')
    # the ranks that are going to fail may still take a step
    seen.look(log, since=1.0)
    assert seen.last_step == 14 and seen.recovered_at is None
    log_of(log, 10)
    seen.look(log, since=1.0)
    assert (seen.restarts, seen.lost_steps, seen.recovered_at) == (1, 4, None)
    with log.open("a") as file:
        file.write(json.dumps({"step": 11}) + "\n")
    seen.look(log, since=1.0)
    assert seen.recovered_at is not None and seen.lost_steps == 4


def test_what_other_code_survived_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    outcome = tmp_path / "outcomes" / "kill-1-0.json"

    def found() -> bool:
        forget_other_code(tmp_path, device)
        return outcome.exists()

    def leave() -> None:
        outcome.parent.mkdir(exist_ok=True)
        outcome.write_text("{}")

    leave()
    assert not found()
    leave()
    assert found() and found()
    monkeypatch.setattr(faults, "source_hash", lambda: "of other code")
    assert not found()


def test_a_fault_that_stops_nobody_is_over_with_the_next_step(tmp_path: Path) -> None:
    log, seen = tmp_path / "metrics.jsonl", Seen(stops=False)
    log_of(log, 3)
    seen.look(log, None)
    seen.look(log, since=1.0)
    assert seen.recovered_at is None
    with log.open("a") as file:
        file.write(json.dumps({"step": 4}) + "\n")
    seen.look(log, since=1.0)
    assert seen.recovered_at is not None


def lines_of(run: FaultyRun) -> list[dict[str, object]]:
    """What two ranks of a good run would have written, in the order of steps."""
    per_epoch = USERS // BATCH
    return [
        {"step": epoch * per_epoch + batch, "refused": False, "sequences": [batch * BATCH + i for i in half]}
        for epoch in range(EPOCHS)
        for batch in range(per_epoch)
        for half in (range(BATCH // 2), range(BATCH // 2, BATCH))
    ]


@pytest.mark.parametrize(
    ("change", "left_out", "said"),
    [
        (lambda lines: lines, [], ""),
        (lambda lines: [*lines, lines[7]], [], "epoch 0: 16 sequences too often, 0 not at all"),
        (lambda lines: lines[:30] + lines[31:], [], "epoch 1: 0 sequences too often, 16 not at all"),
        (lambda lines: lines[:30] + lines[32:], [], "steps [15] are missing"),
        (lambda lines: lines[:30] + lines[32:], [15], ""),
        (lambda lines: [{**line, "refused": line["step"] == 15} for line in lines], [15], ""),
        (lambda lines: lines, [15], "steps [] are missing"),
    ],
)
def test_every_sequence_exactly_once(
    change: object, left_out: list[int], said: str, data: Path, tmp_path: Path
) -> None:
    run = FaultyRun(data, tmp_path)
    folder = run.run_folder.sequences
    folder.mkdir(parents=True)
    lines = change(lines_of(run))  # type: ignore[operator]
    for rank in range(2):
        text = "".join(json.dumps(line) + "\n" for line in lines[rank::2])
        (folder / f"rank-{rank}.jsonl").write_text(text + '{"step": 3, "ref')
    assert trained_once(run, left_out) == said


def outcome(kind: str, seconds: float, recovered: bool = True) -> Outcome:
    return Outcome(
        kind=kind,
        recovered=recovered,
        problem="",
        trained_once=True,
        lost_steps=3,
        seconds=seconds,
        difference=0.01,
    )


def test_figures_of_all_faults_and_of_each_kind() -> None:
    a, b = "bad batch", "clock jump"
    outcomes = [outcome(a, 4.0), outcome(a, 6.0), outcome(b, 0.0, recovered=False)]
    rows = {(row.case, row.metric): row for row in rows_of(outcomes)}
    assert rows["all", "faults"].value == 3 and rows["all", "recovered"].value == 2
    assert rows["all", "seconds_to_recover"].value == 5.0 and rows[a, "lost_steps"].n == 2
    assert rows[b, "recovered"].value == 0 and (b, "lost_steps") not in rows
    assert rows["all", "every_sequence_once_an_epoch"].value == 3 and rows["all", "slowest_to_recover"].value == 6.0
    assert rows[a, "largest_metric_difference"].value <= rows[a, "allowed_metric_difference"].value
    share, slowest = ratios_of(outcomes)
    assert share.value == pytest.approx(2 / 3) and share.target == 1.0
    assert slowest.value == pytest.approx(5.0)


def test_overhead_of_a_launch() -> None:
    seconds = {"torchrun": [4.0, 5.0, 4.0], "launch": [5.0, 5.5, 4.6]}
    assert overheads(seconds).median == pytest.approx(0.6)
    assert [row.metric for row in launch_rows(seconds)] == ["seconds_to_first_step"] * 2 + ["overhead"]
    assert ratio_of(seconds).value == pytest.approx(2 / 0.6)


def test_there_are_enough_kinds_and_faults() -> None:
    assert len(KINDS) >= 8 and sum(kind.times for kind in KINDS.values()) >= 30


def _marks(name: str) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.slow, pytest.mark.distributed]
    # one for every run of the tests, the others in the long ones
    return marks if name == "worker killed" else [*marks, pytest.mark.long]


@pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(name)) for name in KINDS])
def test_a_fault_of_each_kind(name: str, tmp_path: Path) -> None:
    why = KINDS[name].unavailable()
    if why:
        pytest.skip(why)
    assert (
        main(["faults", "--quick", "--only", name, "--folder", str(tmp_path / "runs"), "--output", str(tmp_path)]) == 0
    )
    written = json.loads((tmp_path / "faults.json").read_text())
    assert {row["value"] for row in written["rows"] if row["metric"] in ("faults", "recovered")} == {1.0}
