"""A machine of a run becomes an agent that finds the others, or says in one line why not."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from torch.distributed.run import parse_args

from hstu_dist.config import compose, load, save
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.run_folder import RunFolder
from launch import node
from launch.node import (
    NodeArguments,
    UnreachableError,
    _parse,
    check_port_is_free,
    main,
    own_address,
    prepare,
    wait_for_host,
)
from launch.torchrun import agent_command, agent_environment


@pytest.fixture
def arguments(tmp_path: Path) -> NodeArguments:
    """Of a run with two machines of three ranks each."""
    file = tmp_path / "launch.yaml"
    settings = ["nproc=3", "trainer.threads=2", "cluster.max_restarts=4", "cluster.join_seconds=90"]
    save(compose(["name=x", "cluster=slurm", "cluster.nodes=2", *settings]), file)
    logs = tmp_path / "my logs"
    return NodeArguments(config_file=file, endpoint="127.0.0.1:29411", run_id="7-0", node="PLACE", logs=logs)


def test_arguments_survive_the_command_line(arguments: NodeArguments) -> None:
    words = arguments.words(["apptainer", "exec", "image", "python"])
    assert words[:6] == ["apptainer", "exec", "image", "python", "-m", "launch.node"]
    assert _parse(words[6:]) == arguments


@pytest.mark.parametrize(("place", "is_host"), [("0", True), ("1", False)])
def test_torchrun_reads_the_arguments(arguments: NodeArguments, place: str, is_host: bool) -> None:
    spec = prepare(arguments, {"PLACE": place})
    command, environment = agent_command(spec), agent_environment(spec)
    assert command[:3] == [sys.executable, "-m", "hstu_dist.distributed.agent"]
    read = parse_args(command[3:])
    assert (read.nnodes, read.nproc_per_node, read.max_restarts) == ("2", "3", 4)
    assert (read.rdzv_id, read.rdzv_endpoint, read.local_addr) == ("7-0", "127.0.0.1:29411", "127.0.0.1")
    assert f"is_host={str(is_host).lower()}," in read.rdzv_conf and "join_timeout=90" in read.rdzv_conf
    assert read.log_dir == str(arguments.logs / f"node{place}") and read.tee == "3"
    assert read.training_script_args == ["train", "--config", str(arguments.config_file)]
    loopback = environment["GLOO_SOCKET_IFNAME"]
    assert "127.0.0.1" in [a.address for a in psutil.net_if_addrs()[loopback]]
    assert environment["NCCL_SOCKET_IFNAME"] == loopback and environment["OMP_NUM_THREADS"] == "2"


def test_a_machine_alone_meets_nobody(arguments: NodeArguments) -> None:
    save(compose(["name=x", "cluster=kubernetes"]), arguments.config_file)
    spec = prepare(replace(arguments, endpoint="nowhere.invalid:1"), {"PLACE": "0"})
    assert "--rdzv-endpoint=localhost:0" in agent_command(spec) and "GLOO_SOCKET_IFNAME" not in agent_environment(spec)


def test_an_elastic_run_needs_its_fewest_machines_only(arguments: NodeArguments) -> None:
    save(compose(["name=x", "cluster=slurm", "cluster.nodes=4", "cluster.min_nodes=2"]), arguments.config_file)
    read = parse_args(agent_command(prepare(arguments, {"PLACE": "0"}))[3:])
    assert read.nnodes == "2:4" and "keep_alive_interval=" in read.rdzv_conf


@pytest.mark.slow
@pytest.mark.parametrize("number", ["2", "-1", "first", "UNSET"])
def test_a_number_that_no_machine_has(arguments: NodeArguments, number: str) -> None:
    with pytest.raises(UserError, match=r"--node: got .*, expected a number below 2"):
        prepare(replace(arguments, node=number), {})


def test_settings_that_cannot_be_seen(arguments: NodeArguments, capsys: pytest.CaptureFixture[str]) -> None:
    arguments.config_file.unlink()
    assert main(arguments.words([])[2:]) == 2
    error, mend = capsys.readouterr().err.splitlines()
    assert error == f"error: {socket.gethostname()}: {arguments.config_file} is not there"
    assert mend.startswith("  mend: set output=FOLDER")


def test_a_finished_run_is_found_by_pods_whose_settings_lie_elsewhere(
    arguments: NodeArguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose(["name=x", "cluster=kubernetes", "cluster.max_restarts=1", "trainer.epochs=3"])
    save(config, arguments.config_file)
    asked: list[bool] = []

    def lose_the_first_machine(
        command: object, environment: object, restarts: int, finished: Callable[[], bool]
    ) -> int:
        asked.append(finished())
        RunFolder(config.run_dir).finish({"epochs": 3.0})
        asked.append(finished())
        return ExitCode.FINISHED

    monkeypatch.setattr(node, "run", lose_the_first_machine)
    assert main(replace(arguments, node="0").words([])[2:]) == ExitCode.FINISHED
    assert asked == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "start", "ended", "code", "stays"),
    [
        ("0", "print", ExitCode.FINISHED, ExitCode.STOPPED, False),
        ("0", "print", ExitCode.FAILED, ExitCode.FAILED, False),
        ("1", "print", ExitCode.FINISHED, ExitCode.FINISHED, True),
        # the launch that waits for them still reads it
        ("0", "ssh", ExitCode.FINISHED, ExitCode.FINISHED, True),
    ],
)
def test_lines_given_by_hand_after_a_cancel_go_on(
    place: str, start: str, ended: int, code: int, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = ["cluster=hosts", "cluster.addresses=[localhost,other]", f"cluster.start={start}"]
    config = compose(["name=x", f"output={tmp_path}", *hosts])
    folder = RunFolder(config.run_dir)
    save(config, folder.launch_file)

    def stop(*_: object) -> int:
        folder.stop_file.touch()
        return ended

    monkeypatch.setattr(node, "run", stop)
    monkeypatch.setattr(node, "check_port_is_free", lambda port: None)
    monkeypatch.setattr(node, "wait_for_host", lambda *_: None)
    words = NodeArguments(
        config_file=folder.launch_file, endpoint="localhost:29411", run_id="x", node=place, logs=folder.logs
    ).words([])
    assert main(words[2:]) == code and folder.stop_file.exists() == stays


def test_a_port_in_use() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is in use"):
            check_port_is_free(port)
    check_port_is_free(port)


def test_a_refused_port_is_an_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = time.monotonic()
    wait_for_host("127.0.0.1", port, seconds=30)
    assert time.monotonic() - started < 5


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(UserError, match=r"nowhere\.invalid cannot be reached for 0\.5 s"):
        wait_for_host("nowhere.invalid", 29400, seconds=0.5)
    with pytest.raises(UnreachableError, match=r"no way to nowhere\.invalid"):
        own_address("nowhere.invalid", 29400, None)


def test_a_pod_waits_for_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    known = socket.getaddrinfo("127.0.0.1", 29400, type=socket.SOCK_DGRAM)
    answers = iter([socket.gaierror(-2, "Name or service not known"), known])

    def look_up(*_: object, **__: object) -> object:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(node.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(node, "_RETRY_SECONDS", 0.01)
    assert own_address("localhost", 29400, None, seconds=20)[0].startswith("127.")


def test_who_cannot_reach_the_first_machine_may_try_again(
    arguments: NodeArguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def unreachable(*_: object) -> None:
        raise UnreachableError("gpu1 cannot be reached")

    monkeypatch.setattr(node, "wait_for_host", unreachable)
    words = replace(arguments, node="1").words([])[2:]
    assert main(words) == ExitCode.FAILED
    assert capsys.readouterr().err == "error: gpu1 cannot be reached\n"
    # who comes when the run is over misses nobody
    config = load(arguments.config_file)
    folder = RunFolder(config.run_dir)
    folder.describe(config)
    metrics = {"hr@10": 0.25}
    result = {"epochs": config.trainer.last_epoch, "steps": 16, "stopped_early": False, "best_epoch": 1}
    folder.finish({**result, "test": metrics, "popularity": metrics})
    assert main(words) == ExitCode.FINISHED
    assert "0.2500" in capsys.readouterr().out


def test_the_interface_can_be_chosen() -> None:
    loopback = own_address("127.0.0.1", 29400, None)[1]
    assert own_address("nowhere.invalid", 29400, loopback) == ("127.0.0.1", loopback)
    with pytest.raises(UserError, match=f"got eth77, expected one with an IPv4 address.*{loopback}"):
        own_address("127.0.0.1", 29400, "eth77")
    # Debian gives a machine's own name to it
    with pytest.raises(UserError, match=r"127\.0\.1\.1 leads to 127\.0\.0\.1, which other machines cannot reach"):
        own_address("127.0.1.1", 29400, None)
