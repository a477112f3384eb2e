"""Each host gets a line of its own; over ssh they are waited for, and the worst end is the launch's."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from hstu_dist.config import compose, load
from hstu_dist.run_folder import RunFolder
from launch.__main__ import main
from launch.hosts import commands
from launch.node import _parse
from tests.tiny import tiny_overrides


@pytest.fixture
def overrides(tiny_data: Path, tmp_path: Path) -> list[str]:
    return [*tiny_overrides(tiny_data, tmp_path / "my runs"), "cluster=hosts", "cluster.addresses=[a.example,10.0.0.2]"]


def ssh(folder: Path, line: str) -> str:
    """Override for a stand-in that is called like ssh."""
    program = folder / "ssh"
    program.write_text(f'#!/bin/sh\naddress="$2"\necho "$@" >> {shlex.quote(str(folder))}/called\n{line}\n')
    program.chmod(0o755)
    return f"cluster.ssh=[{program},-q]"


def test_every_host_meets_at_the_first(overrides: list[str], tmp_path: Path) -> None:
    config = compose(overrides)
    lines = commands(config)
    assert [address for address, _ in lines] == ["a.example", "10.0.0.2"]
    for node, (_, line) in enumerate(lines):
        words = shlex.split(line)
        assert words[:4] == ["cd", str(Path.cwd()), "&&", "exec"]
        read = _parse(words[7:])
        assert (read.endpoint, read.node) == ("a.example:29400", str(node))
        assert read.config_file == tmp_path / "my runs" / "tiny" / "launch.yaml"


@pytest.mark.slow
def test_lines_to_start_by_hand(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*overrides, "dry_run=true"]) == 0
    printed = capsys.readouterr().out
    assert not compose(overrides).run_dir.exists()
    assert main(overrides) == 0
    assert capsys.readouterr().out == printed
    assert load(RunFolder(compose(overrides).run_dir).launch_file) == compose(overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("exit 0", 0),
        ('[ "$address" = a.example ] && exit 2; exit 1', 2),
        ('[ "$address" = a.example ] || exit 255', 1),
        ("kill -9 $$", 1),
    ],
)
def test_the_worst_end_counts(line: str, code: int, overrides: list[str], tmp_path: Path) -> None:
    assert main([*overrides, "cluster.start=ssh", ssh(tmp_path, line)]) == code
    called = (tmp_path / "called").read_text().splitlines()
    assert sorted(words.split()[1] for words in called) == ["10.0.0.2", "a.example"]


@pytest.mark.slow
def test_a_stop_on_the_way(overrides: list[str], tmp_path: Path) -> None:
    stop = RunFolder(compose(overrides).run_dir).stop_file
    touch = f"touch {shlex.quote(str(stop))}"
    assert main([*overrides, "cluster.start=ssh", ssh(tmp_path, touch)]) == 75
    assert not stop.exists()
    # a signal to the launch asks the ranks of all hosts by the file
    wait = f"""[ "$address" = a.example ] && kill -TERM $PPID
for _ in $(seq 100); do [ -e {shlex.quote(str(stop))} ] && exit 0; sleep 0.1; done; exit 1"""
    assert main([*overrides, "cluster.start=ssh", ssh(tmp_path, wait)]) == 128 + 15
    assert not stop.exists()


@pytest.mark.slow
def test_a_lost_machine_is_brought_back_while_the_others_go_on(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.hosts._RETURN_SECONDS", 0.5)
    count = f"grep -c 10.0.0.2 {shlex.quote(str(tmp_path))}/called"
    line = f"""[ "$address" = a.example ] && {{ until [ "$({count})" = 3 ]; do sleep 0.1; done; exit 0; }}
[ "$({count})" = 3 ] || exit 255
exec sleep 60"""
    elastic = ["cluster.start=ssh", "cluster.min_nodes=1", ssh(tmp_path, line)]
    # the machine that is on its way back when the run ends is not waited for
    assert main([*overrides, *elastic]) == 0
    assert capfd.readouterr().err.count("10.0.0.2 is lost (exit code 255); the others go on, it is tried again") == 2


def test_every_number_of_machines_must_do(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    elastic = ["cluster.addresses=[a,b,c,d]", "cluster.min_nodes=2", "nproc=8", "trainer.global_batch_size=64"]
    by_column = ["embedding.sharding=column_wise", "embedding.optimizer.kind=adamw", "model.width=256"]
    kept = [word for word in overrides if word.partition("=")[0] not in ("nproc", "model.width", "cluster.addresses")]
    assert main([*kept, *elastic, *by_column]) == 2
    assert "column_wise cannot split width 256 over 24 ranks" in capsys.readouterr().err


def test_bad_input_of_one_machine_is_not_tried_again(overrides: list[str], tmp_path: Path) -> None:
    line = '[ "$address" = a.example ] && exit 1; exit 2'
    assert main([*overrides, "cluster.start=ssh", "cluster.min_nodes=1", ssh(tmp_path, line)]) == 2
    assert len((tmp_path / "called").read_text().splitlines()) == 2


def test_no_hosts(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*overrides, "cluster.addresses=[]"]) == 2
    assert capsys.readouterr().err.startswith("error: cluster.addresses: got none\n  mend: name the machines")
    assert main([*overrides, "cluster.start=ssh", "cluster.ssh=[no-such-ssh]"]) == 2
    assert "error: no-such-ssh: no such program here" in capsys.readouterr().err
