"""The faults of the campaign: what each of them does to a run, and what may differ afterwards."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from benchmarks.environment import ROOT
from benchmarks.fault_run import FaultyRun, FaultyRunError, free_port
from benchmarks.two_hosts import missing, two_hosts

_SAME = 0.0
_OTHER_RANKS = 0.02
_LEFT_OUT = 0.05
_DEVIATION_SECONDS = 600.0
"""Of a rank's last line of log from the jump of its clock: how long ago it may have been written."""
_CLOCK = ROOT / "benchmarks" / "inject" / "clock.c"
_LOCAL = ("nproc=2", "cluster.max_restarts=3")


@dataclass(frozen=True)
class Place:
    """Where a run of the campaign happens.

    Attributes:
        data: prepared data set.
        folder: for everything that the run writes.
        random: draws the step and the victim.
    """

    data: Path
    folder: Path
    random: random.Random

    def step(self) -> int:
        """Where the fault strikes: not before the first checkpoint, not in the last epoch."""
        return self.random.randint(6, 40)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of fault.

    Attributes:
        summary: what happens.
        strike: launches a run, hurts it, and returns it when it has ended.
        times: how often in a campaign.
        tolerance: how far a metric may be from the undisturbed run's.
        unavailable: why it cannot happen on this machine; empty if it can.
    """

    summary: str
    strike: Callable[[Place], FaultyRun]
    times: int = 2
    tolerance: float = _SAME
    unavailable: Callable[[], str] = lambda: ""


def _local(place: Place, *more: str, **variables: str) -> FaultyRun:
    return FaultyRun(place.data, place.folder, (*_LOCAL, *more), variables)


def _goes_on(run: FaultyRun) -> FaultyRun:
    """A run whose ranks need not start again after the fault."""
    run.seen.stops = False
    return run


def _struck(
    number: signal.Signals,
    victim: Callable[[FaultyRun, Place], psutil.Process],
    start: Callable[[Place], FaultyRun] = _local,
) -> Callable[[Place], FaultyRun]:
    """A fault that is one signal to one process, after which the same launch must reach the end."""

    def strike(place: Place) -> FaultyRun:
        with start(place) as run:
            run.reach(place.step())
            process = victim(run, place)
            run.hurt()
            process.send_signal(number)
            _finish(run)
        return run

    return strike


def _any_rank(run: FaultyRun, place: Place) -> psutil.Process:
    return place.random.choice(run.ranks())


def _agent_of(node: int) -> Callable[[FaultyRun, Place], psutil.Process]:
    return lambda run, _place: run.agents()[node]


def _stop_worker(place: Place) -> FaultyRun:
    with _local(place, "trainer.timeout_seconds=4") as run:
        run.reach(place.step())
        ranks = run.ranks()
        victim = place.random.randrange(len(ranks))
        run.hurt()
        ranks[victim].send_signal(signal.SIGSTOP)
        _finish(run)
    named = f"cut off): rank {victim} " if victim else "rank 0 is gone, stopped or cannot be reached"
    if named not in (run.folder / "printed").read_text():
        raise FaultyRunError(f"nobody named rank {victim}")
    return run


def _terminate_launch(place: Place) -> FaultyRun:
    with _local(place) as run:
        run.reach(place.step())
        run.hurt()
        assert run.process is not None
        run.process.terminate()
        if run.end() != 128 + signal.SIGTERM:
            raise FaultyRunError(f"stopped with {run.code()}")
        run.launch()
        _finish(run)
    return run


def _power_failure(place: Place) -> FaultyRun:
    """Ends everything and damages the newest checkpoint, as a disk does that lost its cache."""
    with _local(place) as run:
        run.reach(place.random.randint(11, 40))
        run.hurt()
        run.kill_all()
        newest = sorted(run.run_folder.checkpoints.glob("step-*[0-9]"))[-1]
        file = place.random.choice(sorted(newest.iterdir()))
        content = bytearray(file.read_bytes())
        content[place.random.randrange(len(content))] ^= 0x10
        file.write_bytes(content)
        run.launch()
        _finish(run)
    if not list(run.run_folder.checkpoints.glob(f"{newest.name}.damaged")):
        raise FaultyRunError(f"{newest} passed for whole")
    return run


def _full_disk(place: Place) -> FaultyRun:
    place.folder.mkdir(parents=True)
    with _small_disk(place.folder), _goes_on(_local(place)) as run:
        run.reach(place.step())
        run.hurt()
        ballast = place.folder / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        # two checkpoints are due meanwhile
        wait_until = run.seen.last_step + 10
        run.watch(lambda: "is not written" in (place.folder / "printed").read_text(), "a save that is refused")
        ballast.unlink()
        run.reach(wait_until)
        _finish(run)
        _keep(place.folder, run)
    return run


def _flipped_bit(place: Place) -> FaultyRun:
    return _spoilt(place, times=1)


def _bad_batch(place: Place) -> FaultyRun:
    return _spoilt(place, times=2)


def _injected(**variables: str) -> dict[str, str]:
    return {"PYTHONPATH": f"{ROOT / 'benchmarks' / 'inject'}:{os.environ.get('PYTHONPATH', '')}", **variables}


def _spoilt(place: Place, times: int) -> FaultyRun:
    step, rank = place.step(), place.random.randrange(2)
    with _goes_on(_local(place, **_injected(HSTU_SPOIL=f"{rank}:{step}:{times}"))) as run:
        run.reach(step)
        run.hurt()
        _finish(run)
    refused = sorted(int(path.name.removeprefix("step-")) for path in run.run_folder.replay.glob("step-*"))
    if refused != ([step] if times > 1 else []):
        raise FaultyRunError(f"steps {refused} were refused")
    return run


def _clock_jump(place: Place) -> FaultyRun:
    """Wall clock an hour ahead or behind, for launcher, agent and ranks; the monotonic clock goes on."""
    place.folder.mkdir(parents=True)
    offset, library = place.folder / "offset", place.folder / "clock.so"
    offset.write_text("0")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, _CLOCK], check=True)
    with _goes_on(_local(place, LD_PRELOAD=str(library), CLOCK_OFFSET=str(offset))) as run:
        run.reach(place.step())
        jump = place.random.choice((3600, -3600))
        run.hurt()
        offset.write_text(str(jump))
        _finish(run)
    last = (run.run_folder.logs / "ranks" / "rank-0.log").read_text().splitlines()[-1]
    ahead = (datetime.strptime(last[:19], "%Y-%m-%d %H:%M:%S") - datetime.now()).total_seconds()
    if abs(ahead - jump) > _DEVIATION_SECONDS:
        raise FaultyRunError(f"rank 0 saw a clock {ahead:.0f} s ahead, not {jump}")
    return run


def _two_machines(place: Place, *more: str, **variables: str) -> FaultyRun:
    """Two agents on this machine, which the launcher reaches as it would over ssh unless a file says `down`."""
    place.folder.mkdir(parents=True)
    reach = place.folder / "reach"
    reach.write_text(
        f'#!/bin/bash\n[ -e "{place.folder}/down" ] && [ "$1" = 127.0.0.2 ] && exit 255\nexec bash -c "$2"\n'
    )
    reach.chmod(0o755)
    cluster = (
        *("cluster=hosts", "cluster.addresses=[127.0.0.1,127.0.0.2]", "cluster.start=ssh", f"cluster.ssh=[{reach}]"),
        *(f"cluster.port={free_port()}", "cluster.max_restarts=4", "cluster.join_seconds=60", "nproc=1"),
    )
    return FaultyRun(place.data, place.folder, (*cluster, *more), variables)


def _lose_machine(place: Place) -> FaultyRun:
    with _two_machines(place, "cluster.min_nodes=1") as run:
        _take_away(run, place)
        _finish(run)
    _must_end_on(run, ranks=1)
    return run


def _lose_machine_for_a_while(place: Place) -> FaultyRun:
    # slow enough for the machine to be back before the end
    with _two_machines(place, "cluster.min_nodes=1", **_injected(HSTU_PAUSE="0.5")) as run:
        _take_away(run, place)
        run.watch(lambda: run.seen.recovered_at is not None or run.process is None, "going on alone")
        (place.folder / "down").unlink()
        _finish(run)
    _must_end_on(run, ranks=2)
    return run


def _must_end_on(run: FaultyRun, ranks: int) -> None:
    result = run.run_folder.result()
    if result is None or result["world_size"] != ranks:
        raise FaultyRunError(f"ended on {result and result['world_size']} ranks, not {ranks}")


def _take_away(run: FaultyRun, place: Place) -> None:
    """Ends everything of the second machine, which cannot be reached from then on."""
    run.reach(place.random.randint(6, 20))
    run.hurt()
    (place.folder / "down").touch()
    (node,) = run.with_words("launch.node", "--node", "1")
    for process in (*psutil.Process(node.pid).children(recursive=True), node):
        with suppress(psutil.Error):
            process.kill()


def _cut_cable(place: Place) -> FaultyRun:
    """Two network namespaces whose cable is pulled for longer than a collective waits."""
    place.folder.mkdir(parents=True)
    with two_hosts(place.folder) as hosts:
        addresses = ",".join(hosts.addresses)
        cluster = (
            *("cluster=hosts", f"cluster.addresses=[{addresses}]", "cluster.start=ssh", f"cluster.ssh=[{hosts.reach}]"),
            *("cluster.max_restarts=6", "nproc=1", "trainer.timeout_seconds=3"),
        )
        with FaultyRun(place.data, place.folder, cluster) as run:
            run.reach(place.step())
            run.hurt()
            cable = ["ip", "-n", hosts.names[1], "link", "set", hosts.interfaces[1]]
            subprocess.run([*cable, "down"], check=True)
            with suppress(subprocess.TimeoutExpired):
                assert run.process is not None
                run.process.wait(6)
            subprocess.run([*cable, "up"], check=True)
            _finish(run)
    return run


def _finish(run: FaultyRun) -> None:
    code = run.end()
    if code != 0:
        raise FaultyRunError(f"the launch ended with {code}, see {run.folder / 'printed'}")


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=False)
        yield


def _keep(folder: Path, run: FaultyRun) -> None:
    """Moves a run off the small disk, which goes with its mount."""
    kept = folder.with_name(f"{folder.name}-kept")
    shutil.copytree(folder, kept)
    run.folder = kept


def _needs_root() -> str:
    return "" if os.geteuid() == 0 else "needs root, to mount a small disk"


def _needs_compiler() -> str:
    return "" if shutil.which("cc") else "not installed: a C compiler, for a clock that jumps"


KINDS: Mapping[str, Kind] = {
    "worker killed": Kind(summary="kill -9 of a rank", strike=_struck(signal.SIGKILL, _any_rank), times=3),
    "agent killed": Kind(summary="kill -9 of the agent", strike=_struck(signal.SIGKILL, _agent_of(0)), times=3),
    "worker stopped": Kind(summary="SIGSTOP of a rank, past the collectives' time-out", strike=_stop_worker),
    "worker terminated": Kind(summary="SIGTERM to a rank", strike=_struck(signal.SIGTERM, _any_rank)),
    "launch terminated": Kind(summary="SIGTERM to the launch, then the same command", strike=_terminate_launch),
    "power failure, damaged checkpoint": Kind(
        summary="everything killed, a bit flipped in the newest checkpoint, then the same command",
        strike=_power_failure,
        times=3,
    ),
    "full disk": Kind(
        summary="no space during two saves, then space again", strike=_full_disk, unavailable=_needs_root
    ),
    "flipped bit": Kind(summary="a loss is NaN once", strike=_flipped_bit),
    "bad batch": Kind(
        summary="a loss is NaN whenever it is computed; its batch is left out", strike=_bad_batch, tolerance=_LEFT_OUT
    ),
    "clock jump": Kind(summary="wall clock an hour ahead or behind", strike=_clock_jump, unavailable=_needs_compiler),
    "second machine's agent killed": Kind(
        summary="kill -9, two agents", strike=_struck(signal.SIGKILL, _agent_of(1), _two_machines)
    ),
    "first machine's agent killed": Kind(
        summary="kill -9 of the agent through which both meet",
        strike=_struck(signal.SIGKILL, _agent_of(0), _two_machines),
    ),
    "machine lost for good": Kind(
        summary="one of two machines, with nodes=1:2", strike=_lose_machine, tolerance=_OTHER_RANKS
    ),
    "machine lost and back": Kind(
        summary="one of two machines, with nodes=1:2", strike=_lose_machine_for_a_while, times=1, tolerance=_OTHER_RANKS
    ),
    "cable pulled": Kind(
        summary="link down for longer than the time-out, then up", strike=_cut_cable, unavailable=missing
    ),
}
"""All kinds by name."""
