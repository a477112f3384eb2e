"""The doctor says what is wrong and how to mend it, and does not die of it."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from hstu_dist.__main__ import main
from hstu_dist.commands import doctor as command
from hstu_dist.distributed.process_group import process_group
from hstu_dist.doctor import packages, ranks
from hstu_dist.doctor.finding import Finding, Status, fail, guarded, in_turn, ok, warn
from hstu_dist.doctor.machine import machine_checks
from hstu_dist.errors import UserError
from tests.distributed.cases import tiny_config
from tests.distributed.ranks import run_ranks
from tests.tiny import tiny_overrides


def test_a_finding_reads_as_one_or_two_lines() -> None:
    assert ok("disk", "fast").lines() == "ok    disk: fast"
    assert warn("disk", "slow", "buy one").lines() == "warn  disk: slow\n      mend: buy one"
    assert fail("disk", "none", "buy one").lines().startswith("fail  disk: none\n")


def test_a_check_that_breaks_is_a_finding() -> None:
    def refuses() -> Finding:
        raise UserError("the data is gone", "fetch it")

    def breaks() -> Finding:
        raise ZeroDivisionError("division by zero\nand more")

    assert guarded("data", refuses) == Finding("data", Status.FAIL, "the data is gone", "fetch it")
    found = list(in_turn({"a": breaks, "b": lambda: ok("b", "fine")}))
    assert [finding.status for finding in found] == [Status.FAIL, Status.OK]
    assert found[0].found == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("installed", "status", "said"),
    [
        ({"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}, Status.OK, "torch 2.13.0+cpu"),
        (
            {"torch": "2.12.1", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"},
            Status.FAIL,
            "torch 2.12.1 instead of 2.13.0",
        ),
        ({"torch": "2.13.0", "torchrec": "1.8.0"}, Status.FAIL, "fbgemm-gpu or fbgemm-gpu-cpu is missing"),
        ({"torch": "2.13.0", "fbgemm-gpu": "1.8.0"}, Status.FAIL, "torchrec is missing"),
    ],
)
def test_versions_that_do_not_fit(
    installed: dict[str, str], status: Status, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = ["torch==2.13.0", "torchrec==1.8.0", "numpy>=2.0", 'fbgemm-gpu-cpu==1.8.0; extra == "cpu"']

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: pins)
    finding = packages.package_checks()["versions"]()
    assert finding.status is status and said in finding.found and bool(finding.remedy) == (status is Status.FAIL)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('x.so: undefined symbol: _ZN3c10')", "binary interfaces do not match"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ends with signal 11"),
        ("raise ModuleNotFoundError('No module named fbgemm_gpu')", "No module named fbgemm_gpu"),
    ],
)
def test_packages_that_do_not_load(code: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_LOADS", code)
    finding = packages.package_checks()["torch, fbgemm and torchrec load"]()
    assert finding.status is Status.FAIL and said in finding.found
    assert finding.remedy.endswith("install the versions of pyproject.toml together")


@pytest.mark.parametrize(
    ("said", "driver", "status", "found"),
    [
        ("gloo True|||", False, Status.OK, "CPU, gloo"),
        ("gloo True|12.9|2.27.3|NVIDIA H100", True, Status.OK, "NVIDIA H100; CUDA 12.9, NCCL 2.27.3, gloo"),
        ("gloo True|||", True, Status.FAIL, "this torch is built for CPUs"),
        ("gloo True|12.9||", True, Status.FAIL, "finds no GPU"),
        ("gloo False|||", False, Status.FAIL, "no gloo"),
    ],
)
def test_devices(said: str, driver: bool, status: Status, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_python_says", lambda code: (0, said))
    monkeypatch.setattr(packages.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if driver else None)
    finding = packages.package_checks()["devices"]()
    assert finding.status is status and found in finding.found


@pytest.mark.slow
def test_folders_of_this_machine(tiny_data: Path, tmp_path: Path) -> None:
    good = {f.name: f for f in in_turn(machine_checks(tiny_config(tiny_data, tmp_path / "runs")))}
    assert {f.status for name, f in good.items() if name != "disk"} == {Status.OK}
    assert "60 users, 40 items" in good["data folder"].found and "MB/s" in good["disk"].found
    assert not list((tmp_path / "runs").iterdir())

    (tmp_path / "file").write_text("in the way")
    bad = {f.name: f for f in in_turn(machine_checks(tiny_config(tmp_path / "none", tmp_path / "file")))}
    assert bad["data folder"].status is Status.WARN and "prepare" in bad["data folder"].remedy
    assert bad["run folder"].status is Status.FAIL and "output=FOLDER" in bad["run folder"].remedy
    many = machine_checks(tiny_config(tiny_data, tmp_path, "nproc=4000"))["cores and memory"]()
    assert many.status is Status.WARN and "for 4000 ranks" in many.found


def on_several_machines(folder: Path, amiss: bool) -> Finding:
    """On a rank, alone on its machine: what it is told of the others."""
    with process_group("cpu", 60) as world:
        own = [] if world.rank == 0 else [ok("disk", "fast"), warn("data folder", "is empty", "fill it")][: 1 + amiss]
        return ranks.rank_checks(replace(world, local_size=1), folder, own)["other machines"]()


@pytest.mark.distributed
def test_what_is_amiss_on_another_machine(tmp_path: Path) -> None:
    host = socket.gethostname()
    found = run_ranks(3, on_several_machines, tmp_path, False)
    assert found == [ok("other machines", f"packages, memory and folders of {host} are in order")] * 3
    amiss = f"{host}: data folder: is empty"
    found = run_ranks(3, on_several_machines, tmp_path, True)
    assert found == [warn("other machines", f"{amiss}; {amiss}", "fill it")] * 3


def between_ranks(folder: Path, late: int | None) -> list[Finding]:
    """On a rank: what the ranks find; the clock of one may be ahead."""
    with process_group("cpu", 60) as world:
        true_time = time.time
        if world.rank == late:
            ranks.time.time = lambda: true_time() + 7.5  # type: ignore[assignment]
        return list(in_turn(ranks.rank_checks(world, folder)))


@pytest.mark.distributed
def test_between_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(2, between_ranks, tmp_path, None)
    assert first == second
    found = {finding.name: finding for finding in first}
    assert found["ranks"].found.startswith("2 over gloo on ")
    assert found["clocks"].status is Status.OK and found["machines agree"].status is Status.OK
    assert all(
        "16 MiB in" in found[name].found and "GB/s" in found[name].found for name in ("all-reduce", "all-to-all")
    )
    skewed = {finding.name: finding for finding in run_ranks(2, between_ranks, tmp_path, 1)[0]}
    assert skewed["clocks"].status is Status.FAIL and 7.4e3 < float(skewed["clocks"].found.split()[0]) < 7.6e3


@pytest.mark.slow
@pytest.mark.parametrize("failed", [False, True])
def test_the_verdict_is_the_exit_code(
    failed: bool, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "package_checks", dict)
    output = tmp_path / "runs"
    if failed:
        output.write_text("in the way")
    overrides = tiny_overrides(tiny_data, output)
    assert main(["doctor", "--ranks=0", *overrides]) == (2 if failed else 0)
    lines = capsys.readouterr().out
    assert ("fail  run folder: " in lines) == failed and "ok    data folder: " in lines
    assert main(["doctor", "--ranks=0", "--json", *overrides]) == (2 if failed else 0)
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {"name", "status", "found", "remedy"} == set(findings[0])
    assert ("fail" in {finding["status"] for finding in findings}) == failed


@pytest.mark.slow
@pytest.mark.distributed
def test_the_whole_command(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "RANK" not in os.environ
    assert main(["doctor", "--json", *tiny_overrides(tiny_data, tmp_path)]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert len(findings) >= 15 and findings["torch, fbgemm and torchrec load"]["status"] == "ok"
    assert findings["all-to-all"]["status"] in ("ok", "warn") and findings["ranks"]["found"].startswith("2 over gloo")
