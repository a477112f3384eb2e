"""`doctor`: the first thing to run when a run fails; says what is wrong and how to mend it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from hstu_dist.config import RunConfig
from hstu_dist.doctor.finding import Finding, Status, fail, in_turn
from hstu_dist.doctor.machine import machine_checks
from hstu_dist.doctor.packages import package_checks
from hstu_dist.errors import ExitCode
from hstu_dist.preflight import on_gpus

_RANKS_SECONDS = 300.0


@dataclass(frozen=True)
class DoctorOptions:
    """What was asked for.

    Attributes:
        overrides: of the run, as they were given.
        ranks: local ranks that measure what lies between them; 0: none; None: two, or the run's one on a GPU.
        as_json: one JSON object instead of lines.
    """

    overrides: Sequence[str]
    ranks: int | None
    as_json: bool


def examine(config: RunConfig, options: DoctorOptions, say: Callable[[str], None]) -> ExitCode:
    """Looks at everything and says what it finds; under torchrun every rank calls it.

    Args:
        config: the run whose folders and devices count.
        options: what was asked for.
        say: prints a line.

    Returns:
        BAD_INPUT if anything keeps a run from working.
    """
    under_torchrun = "RANK" in os.environ
    main = os.environ.get("RANK", "0") == "0"
    findings: list[Finding] = []
    for finding in _findings(config, options, under_torchrun, main):
        findings.append(finding)
        if main and not options.as_json:
            say(finding.lines())
    if main and options.as_json:
        say(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    failed = any(finding.status is Status.FAIL for finding in findings)
    # ranks that are silent leave the verdict to rank 0
    return ExitCode.BAD_INPUT if failed and main else ExitCode.FINISHED


def _findings(config: RunConfig, options: DoctorOptions, under_torchrun: bool, main: bool) -> Iterator[Finding]:
    unseen = []
    # one rank a machine looks at it
    if os.environ.get("LOCAL_RANK", "0") == "0" and not (under_torchrun and options.ranks == 0):
        for finding in chain(in_turn(package_checks()), in_turn(machine_checks(config))):
            if main:
                yield finding
            else:
                unseen.append(finding)
    if under_torchrun:
        yield from _among_ranks(config, unseen)
    else:
        ranks = options.ranks if options.ranks is not None else _usual_ranks(config)
        if ranks:
            yield from _local_ranks(ranks, options.overrides)


def _among_ranks(config: RunConfig, unseen: Sequence[Finding]) -> Iterator[Finding]:
    # torch only here: where it is broken, the lines above have said so
    from hstu_dist.distributed.process_group import process_group
    from hstu_dist.doctor.ranks import rank_checks

    with process_group(config.trainer.device, config.trainer.timeout_seconds) as world:
        yield from in_turn(rank_checks(world, Path(config.output), unseen))


def _usual_ranks(config: RunConfig) -> int:
    """Two, so that something lies between them; no more than the run has where each needs a GPU of its own."""
    return min(2, config.nproc) if on_gpus(config) else 2


def _local_ranks(ranks: int, overrides: Sequence[str]) -> Iterator[Finding]:
    """What ranks of this machine find, started as a launch starts them."""
    agent = [sys.executable, "-m", "hstu_dist.distributed.agent", f"--nproc-per-node={ranks}"]
    # no ranks below the ranks: they look at each other only
    inner = ["-m", "hstu_dist", "doctor", "--ranks=0", "--json", *overrides]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    remedy = "mend what is listed above first; then look at the messages of `python -m launch`"
    try:
        done = subprocess.run(
            [*agent, *inner], capture_output=True, text=True, check=False, timeout=_RANKS_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        yield fail("ranks", f"{ranks} ranks did not answer within {_RANKS_SECONDS:g} s", remedy)
        return
    line = next((line for line in done.stdout.splitlines() if line.startswith('{"findings"')), None)
    if line is None:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        why = next((text for text in said if text.startswith("error: ")), said[-1])
        yield fail("ranks", why.removeprefix("error: "), remedy)
        return
    for found in json.loads(line)["findings"]:
        yield Finding(found["name"], Status(found["status"]), found["found"], found["remedy"])
