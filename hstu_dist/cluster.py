"""Where the ranks of a run start: one configuration class a kind of cluster; importable without torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from hstu_dist.validation import STRICT

DEFAULT_PORT = 29400
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_SIGNAL_LEEWAY = 60
"""Seconds by which Slurm may send a signal too early."""
_TIME_LIMIT = re.compile(r"(\d+-)?\d+(:\d{2}){0,2}")
_SSH = (
    *("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    # without these it waits for hours for a machine that has lost its power
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"),
)
_KUBERNETES_NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"


def _seconds(limit: str) -> int:
    """Of a time limit as Slurm writes it."""
    days, dash, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    # the first part is hours after days and of three, minutes otherwise
    hours, minutes, seconds = (*parts, 0, 0)[:3] if dash or len(parts) == 3 else (0, *parts, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _ClusterConfig:
    """What all kinds share.

    Attributes:
        memory_per_rank_gib: host memory that a rank may use; null: the machine's memory divided by its ranks.
        max_restarts: how often each machine starts its ranks, or its agent, again after a failure.
    """

    memory_per_rank_gib: float | None = Field(default=None, gt=0)
    max_restarts: int = Field(default=0, ge=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LocalConfig(_ClusterConfig):
    """All ranks on this machine."""

    kind: Literal["local"] = "local"

    @property
    def nodes(self) -> int:
        """Machines of a run."""
        return 1

    @property
    def least_nodes(self) -> int:
        """Machines that it can go on with."""
        return 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _NetworkConfig(_ClusterConfig):
    """What all kinds with several machines share.

    Attributes:
        port: where the agents of all machines meet, on the first one; null: 29400, on Slurm by the job's number.
        interface: network interface that the ranks talk over; null: the one that leads to the first machine.
        join_seconds: how long a machine waits for the others to appear.
        min_nodes: machines with which the run goes on when others are lost, until they return; null: it waits for
            all of them.
    """

    port: int | None = Field(default=None, ge=1024, le=65535)
    interface: str | None = None
    join_seconds: int = Field(default=600, gt=0)
    min_nodes: int | None = Field(default=None, gt=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HostsConfig(_NetworkConfig):
    """Machines without a scheduler, which share the folders of code, data and runs under the same paths.

    Attributes:
        addresses: names or IPv4 addresses by which the machines know each other; the first one is the meeting point.
        start: print shows each machine's command, to be started by hand; ssh starts them all and waits.
        ssh: the program and its options, followed by the address and the command.
    """

    kind: Literal["hosts"] = "hosts"
    addresses: tuple[str, ...] = ()
    start: Literal["print", "ssh"] = "print"
    ssh: tuple[str, ...] = _SSH

    def __post_init__(self) -> None:
        for address in self.addresses:
            if not _HOST.fullmatch(address):
                raise ValueError(f"addresses: got {address!r}, expected host names or IPv4 addresses")
        if len(set(self.addresses)) < len(self.addresses):
            raise ValueError(f"addresses: got {', '.join(self.addresses)}, expected each host once")
        if not self.ssh:
            raise ValueError("ssh: got no words, expected a program and its options")

    @property
    def nodes(self) -> int:
        """Machines of a run."""
        return len(self.addresses)

    @property
    def least_nodes(self) -> int:
        """Machines that it can go on with."""
        return self.min_nodes or self.nodes


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SlurmConfig(_NetworkConfig):
    """A Slurm cluster whose nodes share the folders of code, data and runs.

    Attributes:
        nodes: machines of a run.
        partition, account: as sbatch knows them; null: the cluster's defaults.
        time_limit: text of minutes, [days-]hours:minutes:seconds or days-hours, in quotes in YAML, which else reads
            4:00:00 as a number; null: the partition's.
        cpus_per_rank: cores of a rank; null: the cluster's default for a node's task.
        memory_gib: memory of a node; null: the cluster's default.
        stop_seconds: a job that reaches its time limit saves a checkpoint so many seconds before and queues again.
        sbatch: more options of the job, such as `--constraint=h100`.
        srun: more options of the step that starts the ranks, such as those of a container plug-in.
        setup: shell lines before the ranks start, such as `module load`.
        python: words that start Python on a node, such as a container's; null: the Python that runs the launcher.
    """

    kind: Literal["slurm"] = "slurm"
    nodes: int = Field(default=1, gt=0)
    partition: str | None = None
    account: str | None = None
    time_limit: str | None = None
    cpus_per_rank: int | None = Field(default=None, gt=0)
    memory_gib: float | None = Field(default=None, gt=0)
    stop_seconds: int = Field(default=180, ge=1, le=65535)
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    python: tuple[str, ...] | None = None

    @field_validator("time_limit", mode="before")
    @classmethod
    def _refuse_numbers(cls, value: Any) -> Any:
        # YAML 1.1 takes 4:00:00 for seconds, 14400, which Slurm would take for minutes
        if isinstance(value, int | float):
            raise ValueError(
                f'got the number {value}, expected text: "4:00:00", or "240" for minutes, with the quotes '
                """(in a shell 'cluster.time_limit="240"')"""
            )
        return value

    def __post_init__(self) -> None:
        if self.time_limit is not None:
            if not _TIME_LIMIT.fullmatch(self.time_limit):
                raise ValueError(
                    f"time_limit: got {self.time_limit!r}, expected minutes or [days-]hours:minutes:seconds"
                )
            seconds = _seconds(self.time_limit)
            # zero is no limit
            if 0 < seconds <= self.stop_seconds + _SIGNAL_LEEWAY:
                raise ValueError(
                    f"time_limit: got {self.time_limit!r}, {seconds} s, expected more than stop_seconds "
                    f"({self.stop_seconds}) and a minute: each job would stop before its first step and queue again"
                )
        for name in ("sbatch", "srun"):
            for option in getattr(self, name):
                if not option.startswith("-") or "\n" in option:
                    raise ValueError(f"{name}: got {option!r}, expected options such as --constraint=h100")

    @property
    def least_nodes(self) -> int:
        """Machines that it can go on with."""
        return self.min_nodes or self.nodes


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KubernetesConfig(_NetworkConfig):
    """A Kubernetes cluster: one pod a machine, as an Indexed Job.

    Attributes:
        nodes: pods of a run.
        image: container image with this package.
        namespace: of everything that is created.
        cpus: cores of a pod; null: no request.
        memory_gib: memory of a pod; null: no request.
        shared_memory_gib: size of /dev/shm, which NCCL uses.
        gpu_resource: name by which the cluster hands out GPUs.
        claim: persistent volume claim, writable by all pods at once; null: an empty folder that ends with its pod.
        folder: where the claim is mounted; relative paths such as `output` and `data.path` start there.
        pod_failures: failed pods, per machine of the run, that are replaced before the run counts as failed.
        node_selector: labels that a machine must have; null: none.
    """

    kind: Literal["kubernetes"] = "kubernetes"
    nodes: int = Field(default=1, gt=0)
    image: str = Field(default="hstu_dist:cpu", pattern=r"^\S+$")
    namespace: str = Field(default="default", pattern=_KUBERNETES_NAME)
    cpus: float | None = Field(default=None, gt=0)
    memory_gib: float | None = Field(default=None, gt=0)
    shared_memory_gib: float = Field(default=8.0, gt=0)
    gpu_resource: str = "nvidia.com/gpu"
    claim: str | None = Field(default=None, pattern=_KUBERNETES_NAME)
    folder: str = Field(default="/workspace", pattern=r"^/[^\s]+$")
    pod_failures: int = Field(default=3, ge=0)
    node_selector: dict[str, str] | None = None

    @property
    def least_nodes(self) -> int:
        """Machines that it can go on with."""
        return self.min_nodes or self.nodes


ClusterConfig = Annotated[LocalConfig | HostsConfig | SlurmConfig | KubernetesConfig, Field(discriminator="kind")]
"""Any place where ranks can start."""
