"""Two hosts with a network between them: a run over both equals a run on one; what is amiss is said in a line."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.two_hosts import TwoHosts, missing, two_hosts
from launch.__main__ import main
from tests.launch.runs import Ended, Started, TinyRun

_MISSING = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.netns,
    pytest.mark.skipif(bool(_MISSING), reason=_MISSING),
]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


def settings(hosts: TwoHosts, *more: str) -> list[str]:
    addresses = ",".join(hosts.addresses)
    cluster = ["cluster=hosts", f"cluster.addresses=[{addresses}]", "cluster.start=ssh", f"cluster.ssh=[{hosts.reach}]"]
    return [*cluster, "nproc=1", "trainer.threads=1", *more]


def test_two_hosts_train_stop_and_continue(undisturbed: tuple[TinyRun, Ended], hosts: TwoHosts, tmp_path: Path) -> None:
    whole, _ = undisturbed
    run = TinyRun(whole.data, tmp_path)
    with run.launch(*settings(hosts)) as launch:
        run.wait_for_step(6, launch)
        assert main(["cancel", str(run.folder)]) == 0
        stopped = launch.wait()
    assert stopped.code == 75, stopped.err
    assert f"stopped at step {run.checkpoints()[-1]} by {run.folder}/stop" in stopped.out
    assert not (run.folder / "stop").exists()

    with run.launch(*settings(hosts)) as launch:
        ended = launch.wait()
    assert ended.code == 0, ended.err
    assert run.result() == whole.result()
    assert {path.parts[-5] for path in run.folder.glob("logs/node*/*/attempt_0/0/stdout.log")} == {"node0", "node1"}
    assert main(["cancel", str(run.folder)]) == 2


def test_a_killed_rank_restarts_those_of_both_hosts(
    undisturbed: tuple[TinyRun, Ended], hosts: TwoHosts, tmp_path: Path
) -> None:
    whole, _ = undisturbed
    run = TinyRun(whole.data, tmp_path)
    with run.launch(*settings(hosts, "cluster.max_restarts=3")) as launch:
        run.wait_for_step(2, launch)
        launch.ranks()[1].kill()
        ended = launch.wait()
    assert ended.code == 0, ended.err
    assert ended.err.count("rank 0 of 2 starts") == 2 and "starting all ranks again" in ended.err
    assert run.result() == whole.result()


def test_the_doctor_looks_at_both_hosts(tiny_data: Path, hosts: TwoHosts, tmp_path: Path) -> None:
    run = TinyRun(tiny_data, tmp_path)
    with Started(["-m", "launch", "doctor", *run.overrides, *settings(hosts)], tmp_path / "printed") as launch:
        ended = launch.wait()
    assert ended.code == 0, ended.err
    lines = {line.partition(": ")[0].rpartition("]:")[2]: line.partition(": ")[2] for line in ended.out.splitlines()}
    assert lines["ok    ranks"] == f"2 over gloo on {', '.join(hosts.names)}"
    assert any(name.endswith("other machines") and hosts.names[1] in found for name, found in lines.items())
    assert lines["ok    machines agree"] == "same code and libraries, one run folder"
    assert any("all-to-all" in name and "GB/s a rank" in found for name, found in lines.items())


def node_line(run: TinyRun, hosts: TwoHosts, node: int, *more: str) -> list[str]:
    """What a user would type on a host, after the launch has printed it."""
    overrides = [*run.overrides, *settings(hosts, "cluster.start=print", *more)]
    with Started(["-m", "launch", *overrides], run.output / "printed") as launch:
        printed = launch.wait()
    assert printed.code == 0, printed.err
    lines = [line for line in printed.out.splitlines() if not line.startswith("#")]
    return [str(hosts.reach), hosts.addresses[node], lines[node]]


def test_a_port_in_use_and_a_host_that_does_not_answer(tiny_data: Path, hosts: TwoHosts, tmp_path: Path) -> None:
    run = TinyRun(tiny_data, tmp_path)
    first = node_line(run, hosts, 0)
    listen = "import socket, sys; s = socket.create_server(('', 29400)); print('up', flush=True); sys.stdin.read()"
    taken = [str(hosts.reach), hosts.addresses[0], f"exec python3 -c {shlex.quote(listen)}"]
    with subprocess.Popen(taken, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        refused = subprocess.run(first, capture_output=True, text=True, check=False, timeout=60)
        process.communicate()
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        f"error: {hosts.names[0]}: port 29400 is in use",
        "  mend: set cluster.port to a free one",
    ]

    nowhere = node_line(
        run, hosts, 1, "cluster.join_seconds=2", f"cluster.addresses=[10.213.251.9,{hosts.addresses[1]}]"
    )
    nowhere[1] = hosts.addresses[1]
    refused = subprocess.run(nowhere, capture_output=True, text=True, check=False, timeout=60)
    # others may come up later
    assert refused.returncode == 1
    assert f"error: {hosts.names[1]}: 10.213.251.9 cannot be reached for 2 s" in refused.stderr
    assert "Traceback" not in refused.stderr
