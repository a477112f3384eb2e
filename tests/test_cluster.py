"""Each kind of cluster refuses what it cannot do, in one line that names the setting."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from hstu_dist.cluster import ClusterConfig, HostsConfig, SlurmConfig
from hstu_dist.config import compose, load, save
from hstu_dist.errors import UserError
from hstu_dist.preflight import check_plan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cluster", "override", "expected"),
    [
        ("local", "cluster.nodes=2", "cluster.nodes: no such key"),
        ("hosts", "cluster.nodes=2", "cluster.nodes: no such key"),
        ("hosts", "cluster.addresses=[a,b,a]", "cluster: addresses: got a, b, a, expected each host once"),
        ("hosts", "cluster.addresses=['a;b']", "cluster: addresses: got 'a;b', expected host names or IPv4 addresses"),
        ("hosts", "cluster.start=rsh", "cluster.start: "),
        ("hosts", "cluster.ssh=[]", "cluster: ssh: got no words"),
        ("hosts", "cluster.port=80", "cluster.port: "),
        ("slurm", "cluster.nodes=0", "cluster.nodes: "),
        ("slurm", "cluster.min_nodes=2", "cluster.min_nodes: got 2, expected at most the 1 machines"),
        ("hosts", "cluster.min_nodes=0", "cluster.min_nodes: "),
        ("slurm", "cluster.time_limit=soon", "cluster: time_limit: got 'soon', expected minutes or"),
        ("slurm", "cluster.time_limit=0:04:00", "cluster: time_limit: got '0:04:00', 240 s, expected more than"),
        ("slurm", "cluster.time_limit=3:59", "cluster: time_limit: got '3:59', 239 s, expected more than"),
        ("slurm", "cluster.time_limit=90", "cluster.time_limit: got the number 90, expected text: "),
        ("slurm", "cluster.sbatch=[exclusive]", "cluster: sbatch: got 'exclusive', expected options such as"),
        ("slurm", "cluster.srun=[mpi]", "cluster: srun: got 'mpi', expected options such as"),
        ("slurm", "cluster.stop_seconds=0", "cluster.stop_seconds: "),
        ("kubernetes", "cluster.namespace=My_Team", "cluster.namespace: "),
        ("kubernetes", "cluster.image=a b", "cluster.image: "),
        ("kubernetes", "cluster.folder=work", "cluster.folder: "),
        ("kubernetes", "cluster.pod_failures=-1", "cluster.pod_failures: "),
    ],
)
def test_bad_settings(cluster: str, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(["name=x", f"cluster={cluster}", override])
    assert caught.value.problem.startswith(f"configuration: {expected}"), caught.value.problem


@pytest.mark.slow
@pytest.mark.parametrize("limit", ['"90"', '"0"', "4:01", "2:00:00", "1-12", "1-12:30:00"])
def test_time_limits_as_slurm_writes_them(limit: str, tmp_path: Path) -> None:
    config = compose(["name=x", "cluster=slurm", f"cluster.time_limit={limit}"])
    assert isinstance(config.cluster, SlurmConfig)
    assert config.cluster.time_limit == limit.strip('"')
    # as the nodes read it
    save(config, tmp_path / "launch.yaml")
    assert load(tmp_path / "launch.yaml") == config


@pytest.mark.parametrize(
    ("written", "number"), [("4:00:00", 14400), ("4:00", 240), ("240", 240), ("4:00:00.5", 14400.5)]
)
def test_a_time_limit_that_yaml_reads_as_a_number_is_refused(written: str, number: float) -> None:
    values = OmegaConf.to_container(OmegaConf.create(f"kind: slurm\ntime_limit: {written}"))
    with pytest.raises(ValidationError, match=f"got the number {number}, expected text: "):
        TypeAdapter(ClusterConfig).validate_python(values)


def test_ranks_of_all_machines() -> None:
    assert compose(["name=x", "nproc=3"]).world_size == 3
    assert compose(["name=x", "nproc=3", "cluster=slurm", "cluster.nodes=4"]).world_size == 12
    elastic = compose(["name=x", "nproc=3", "cluster=slurm", "cluster.nodes=4", "cluster.min_nodes=2"])
    assert (elastic.least_world_size, elastic.world_size) == (6, 12)
    hosts = compose(["name=x", "nproc=3", "cluster=hosts", "cluster.addresses=[a,b]"])
    assert hosts.world_size == 6 and hosts.cluster == HostsConfig(addresses=("a", "b"))


@pytest.mark.parametrize(
    ("memory", "refused"),
    [(None, False), ("cluster.memory_gib=1", True), ("cluster.memory_per_rank_gib=0.25", True)],
)
def test_memory_of_a_node_is_known_only_if_it_was_asked_for(
    memory: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    overrides = ["name=x", "cluster=slurm", "cluster.nodes=2", "nproc=4", *([memory] if memory else [])]
    config = compose(overrides)
    # 10 million rows of 52 numbers and an accumulator: 0.25 GiB on each of 8 ranks
    if not refused:
        check_plan(config, num_items=10_000_000, world_size=8)
        return
    with pytest.raises(UserError, match=r"on rank 0 of 8 \(item: 11000000 rows, .*, row_wise\), 0.25 GiB available"):
        check_plan(config, num_items=11_000_000, world_size=8)
