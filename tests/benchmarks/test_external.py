"""Outside programs: real ones are started, read and timed; what they get wrong is one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks import external
from benchmarks.__main__ import main
from benchmarks.encoder_cases import ragged
from benchmarks.external import Program
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.schema import MANIFEST_FILE
from hstu_dist.report.results import load

PATTERN = r"tokens=(?P<tokens>[\d,.]+)(?: seconds=(?P<seconds>\S+))?"


def program(code: str, pattern: str = PATTERN, skip: int = 0, timeout: float = 60.0) -> Program:
    return Program(command=(sys.executable, "-c", code), pattern=re.compile(pattern), skip=skip, timeout=timeout)


def test_matches_are_added_up_and_the_warm_up_left_out() -> None:
    said = "tokens=999 seconds=1\ntokens=1,000 seconds=0.5\nnoise\ntokens=3000 seconds=1.5\n"
    assert program("", skip=1).read(said, wall=100.0) == 2000.0
    # without a group for seconds the whole process is timed
    assert program("", r"tokens=(?P<tokens>\d+)").read("tokens=50", wall=2.0) == 25.0


def test_a_program_is_run_and_read_from_both_streams() -> None:
    code = "import sys; print('tokens=10 seconds=2'); print('tokens=10 seconds=3', file=sys.stderr)"
    assert program(code).rate() == 4.0


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (program("print('hello')"), "found 0 matches after the first 0.*the output ends with: hello"),
        (program("print('tokens=5 seconds=0')"), "5 tokens and 0 seconds"),
        (program("print('tokens=5 seconds=fast')"), "found no number"),
        (program("import sys; sys.exit('broken')"), "ended with exit code 1: broken"),
        (program("import time; time.sleep(60)", timeout=0.3), "took more than 0.3 s"),
        (Program(command=("/does/not/exist",), pattern=re.compile(PATTERN), skip=0, timeout=1.0), "cannot be started"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_program_gets_wrong_is_said(made: Program, problem: str) -> None:
    with pytest.raises(external.UserError, match=problem):
        made.rate()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--command", "x", "--pattern", "("], "no regular expression"),
        (["--command", "x", "--pattern", "abc"], "without a group tokens"),
        (["--command", "x {events}", "--pattern", PATTERN, "--data", "."], "holds no prepared data set"),
        (["--command", "x", "--pattern", PATTERN, "--name", "hstu_dist"], "which is ours"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["external", "--device", "cpu", *arguments]) == 2
    shown = capsys.readouterr().err
    assert problem in shown and shown.count("\n") == 1


def test_events_exist_with_a_law_only(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--command", "x {events}", "--pattern", PATTERN, "--data", str(tiny_data)]
    assert main(["external", "--device", "cpu", *arguments]) == 2
    assert "exists with --law only" in capsys.readouterr().err


def test_both_are_measured_in_turn_on_sequences_of_the_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def ours(options: object, places: dict[str, str]) -> float:
        order.append("ours")
        assert Path(places["data"], MANIFEST_FILE).exists()
        return 300.0

    monkeypatch.setattr(external, "ours", ours)
    peer = tmp_path / "peer.py"
    peer.write_text(
        "import sys\nlines = open(sys.argv[1]).read().splitlines()\nprint(f'tokens={len(lines) - 1} seconds=1')\n"
    )
    command = f"{sys.executable} {peer} {{events}}"
    law = ["--law", "ragged", "--longest", "40", "--sequences", "9"]
    output = ["--output", str(tmp_path / "out"), "--device", "cpu", "--rounds", "2"]
    assert main(["external", "--command", command, "--pattern", PATTERN, "--name", "peer", *law, *output]) == 0
    expected = ragged(40, 9)
    found = load("external", tmp_path / "out")
    # each history has three events more than a training step reads
    events = expected.tokens + 3 * 9
    assert found.value("ragged lengths up to 40", "peer", "tokens/s") == events
    assert [ratio.value for ratio in found.ratios] == [pytest.approx(300.0 / events)]
    assert order == ["ours", "ours"]
    dataset = SequenceDataset.open(tmp_path / "out" / "external" / "prepared")
    assert sorted(int(n) - 3 for n in dataset.lengths) == sorted(expected.lengths)
