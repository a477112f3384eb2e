"""A real Slurm on this machine: one controller and two virtual nodes, each a daemon of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
_SECONDS = 150

_CONFIG = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=20
OverTimeLimit=0
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_1}-{node_2}] CPUs=4 RealMemory=10000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class VirtualSlurm:
    """Two nodes, n1 and n2."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """With which Slurm's programs find this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        fields = dict(word.partition("=")[::2] for word in self.call("scontrol", "show", "job", job).split())
        return fields[name]

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _SECONDS
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.2)

    def wait_for_end(self, job: str) -> str:
        """The state in which the job ended."""
        self.wait_until(lambda: self.field(job, "JobState") in ENDED, f"job {job} does not end")
        return self.field(job, "JobState")


def missing() -> str:
    """Why there can be no virtual cluster here; empty if there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)"
    return "" if os.geteuid() == 0 else "needs root"


@contextlib.contextmanager
def virtual_slurm(folder: Path) -> Iterator[VirtualSlurm]:
    """Starts the daemons and stops them."""
    cluster = VirtualSlurm(folder)
    controller, node_1, node_2 = _free_ports()
    text = _CONFIG.format(host=socket.gethostname(), folder=folder, controller=controller, node_1=node_1, node_2=node_2)
    (folder / "slurm.conf").write_text(text.lstrip())
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    with contextlib.ExitStack() as stack:
        munge = ("--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket")
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
        stack.enter_context(_daemon(["/usr/sbin/munged", *munge, *files], folder / "munged.out", cluster))
        cluster.wait_until((folder / "munge.socket").exists, "munged does not start")
        config = str(folder / "slurm.conf")
        stack.enter_context(_daemon(["/usr/sbin/slurmctld", "-D", "-c", "-f", config], folder / "ctld.out", cluster))
        for node in ("n1", "n2"):
            command = ["/usr/sbin/slurmd", "-D", "-N", node, "-f", config]
            stack.enter_context(_daemon(command, folder / f"{node}.out", cluster))
        cluster.wait_until(lambda: _idle(cluster), "the nodes do not come up")
        yield cluster
        cluster.call("scancel", "--user=root")
        cluster.wait_until(lambda: not cluster.call("squeue", "--noheader"), "jobs are left")


@contextlib.contextmanager
def _daemon(command: list[str], out: Path, cluster: VirtualSlurm) -> Iterator[None]:
    with out.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, **cluster.environment}, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _idle(cluster: VirtualSlurm) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T %D"],
        env={**os.environ, **cluster.environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.stdout.split() == ["idle", "2"]


def _free_ports() -> tuple[int, int, int]:
    """A free port, and two free ones in a row."""
    for first in range(17000, 19000, 4):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + 3):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return first, first + 1, first + 2
    raise AssertionError("no free ports")
