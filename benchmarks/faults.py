"""The fault campaign: real faults at random steps, after which a run must end as if nothing had happened."""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.environment import ROOT, describe, source_hash
from benchmarks.fault_kinds import KINDS, Kind, Place
from benchmarks.fault_run import FaultyRun, FaultyRunError, prepared_data, trained_once
from benchmarks.harness import Samples
from benchmarks.options import positive
from hstu_dist.files import write_atomically
from hstu_dist.report.results import Ratio, Results, Row, write

log = logging.getLogger(__name__)

_TARGET_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one fault.

    Attributes:
        kind: of the fault.
        recovered: whether the run ended as it had to.
        problem: why not.
        trained_once: whether every sequence was trained on exactly once an epoch, but for batches rightly refused.
        lost_steps: steps that were taken and taken again.
        seconds: from the fault to the next step.
        difference: largest difference of a test metric to the undisturbed run's.
    """

    kind: str
    recovered: bool
    problem: str
    trained_once: bool
    lost_steps: int
    seconds: float
    difference: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--only", choices=sorted(KINDS), help="one kind")
    parser.add_argument("--seed", type=int, default=1, help="of steps and victims (default: %(default)s)")
    parser.add_argument("--minutes", type=positive, help="stop after so long; the same command goes on")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "faults", help="of the runs (default: runs/faults)"
    )


def run(options: argparse.Namespace) -> int:
    """Strikes, checks and writes the result file once all faults are done; returns 1 if a run did not recover."""
    started = time.monotonic()
    folder: Path = options.folder.absolute()
    forget_other_code(folder, options.device)
    data = prepared_data(folder)
    undisturbed = _undisturbed(data, folder)
    outcomes, files = [], []
    for kind, number in _plan(options.only, options.quick):
        file = folder / "outcomes" / f"{re.sub(r'[^a-z]+', '-', kind)}-{options.seed}-{number}.json"
        if not file.exists():
            if options.minutes is not None and time.monotonic() - started > 60 * options.minutes:
                log.info("time is up; the same command goes on")
                return 0
            outcome = _strike(
                kind, Place(data, _fresh(folder / file.stem), _random(options.seed, kind, number)), undisturbed
            )
            write_atomically(file, json.dumps(asdict(outcome)).encode())
        outcome = Outcome(**json.loads(file.read_text()))
        log.info("%s: %s", file.stem, _in_words(outcome))
        outcomes.append(outcome)
        files.append(file)
    results = Results(
        name="faults",
        command=options.command,
        rows=tuple(rows_of(outcomes)),
        ratios=tuple(ratios_of(outcomes)),
        **asdict(describe(options.device)),
    )
    log.info("written to %s", write(results, options.output))
    for file in files:
        file.unlink()
    return 0 if all(outcome.recovered for outcome in outcomes) else 1


def forget_other_code(folder: Path, device: torch.device) -> None:
    """Removes what an interrupted campaign has found with other code, on another device or with other versions."""
    here = describe(device)
    stamp = json.dumps({**here.versions, "code": source_hash(), "device": here.device}, indent=1).encode()
    file = folder / "stamp.json"
    if not file.exists() or file.read_bytes() != stamp:
        for found in ("outcomes", "undisturbed"):
            shutil.rmtree(folder / found, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, stamp)


def _plan(only: str | None, quick: bool) -> Iterator[tuple[str, int]]:
    """Kind and number of every fault that can happen here."""
    for name, kind in KINDS.items():
        if only not in (None, name):
            continue
        why = kind.unavailable()
        if why:
            log.warning("%s: left out, %s", name, why)
            continue
        yield from ((name, number) for number in range(1 if quick else kind.times))


def _random(seed: int, kind: str, number: int) -> random.Random:
    return random.Random(f"{seed} {kind} {number}")


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _undisturbed(data: Path, folder: Path) -> dict[str, float]:
    """Metrics of a run that is left alone."""
    run = FaultyRun(data, folder / "undisturbed", ("nproc=2",))
    if run.run_folder.result() is None:
        with run:
            run.end()
    problem = trained_once(run)
    if problem:
        raise FaultyRunError(f"the undisturbed run: {problem}")
    return run.metrics()


def _strike(name: str, place: Place, undisturbed: dict[str, float]) -> Outcome:
    kind = KINDS[name]
    try:
        struck = kind.strike(place)
        return _judge(name, struck, undisturbed)
    except FaultyRunError as error:
        return Outcome(
            kind=name,
            recovered=False,
            problem=str(error),
            trained_once=False,
            lost_steps=0,
            seconds=0.0,
            difference=0.0,
        )


def _judge(name: str, struck: FaultyRun, undisturbed: dict[str, float]) -> Outcome:
    kind: Kind = KINDS[name]
    seen, since = struck.seen, struck.since
    assert since is not None
    refused = [int(path.name.removeprefix("step-")) for path in struck.run_folder.replay.glob("step-*")]
    wrong = problem = trained_once(struck, refused)
    metrics = struck.metrics()
    difference = max(abs(metrics[metric] - value) for metric, value in undisturbed.items())
    if not problem and difference > kind.tolerance:
        problem = f"a metric differs by {difference:.4f}, allowed {kind.tolerance}"
    if not problem and seen.recovered_at is None:
        problem = "no step was seen after the fault"
    return Outcome(
        kind=name,
        recovered=not problem,
        problem=problem,
        trained_once=not wrong,
        lost_steps=seen.lost_steps,
        seconds=(seen.recovered_at or since) - since,
        difference=difference,
    )


def _in_words(outcome: Outcome) -> str:
    if not outcome.recovered:
        return f"NOT recovered: {outcome.problem}"
    lost = f"{outcome.lost_steps} steps lost"
    return f"recovered in {outcome.seconds:.1f} s, {lost}, metrics differ by {outcome.difference:.4f}"


def rows_of(outcomes: Sequence[Outcome]) -> Iterator[Row]:
    """Figures of all faults together, then of each kind."""
    yield from _rows("all", outcomes)
    for name in dict.fromkeys(outcome.kind for outcome in outcomes):
        yield from _rows(name, [outcome for outcome in outcomes if outcome.kind == name])


def _rows(case: str, outcomes: Sequence[Outcome]) -> Iterator[Row]:
    counts = {
        "faults": len(outcomes),
        "recovered": sum(outcome.recovered for outcome in outcomes),
        "every_sequence_once_an_epoch": sum(outcome.trained_once for outcome in outcomes),
    }
    for metric, count in counts.items():
        yield Samples((float(count),)).row(case, "hstu_dist", metric, "1")
    recovered = [outcome for outcome in outcomes if outcome.recovered]
    if not recovered:
        return
    yield Samples(tuple(float(o.lost_steps) for o in recovered)).row(case, "hstu_dist", "lost_steps", "steps")
    yield Samples(tuple(o.seconds for o in recovered)).row(case, "hstu_dist", "seconds_to_recover", "s")
    largest = {
        "most_lost_steps": (float(max(o.lost_steps for o in recovered)), "steps"),
        "slowest_to_recover": (max(o.seconds for o in recovered), "s"),
        "largest_metric_difference": (max(o.difference for o in recovered), "1"),
        "allowed_metric_difference": (max(KINDS[o.kind].tolerance for o in recovered), "1"),
    }
    for metric, (value, unit) in largest.items():
        yield Samples((value,)).row(case, "hstu_dist", metric, unit)


def ratios_of(outcomes: Sequence[Outcome]) -> Iterator[Ratio]:
    """The targets: all recover, and the slowest does within half a minute."""
    recovered = [outcome for outcome in outcomes if outcome.recovered]
    share = len(recovered) / len(outcomes)
    yield Ratio(case="all", metric="recovered", a="recovered", b="faults", value=share, target=1.0)
    slowest = max((outcome.seconds for outcome in recovered), default=0.0)
    if slowest:
        limit = _TARGET_SECONDS / slowest
        yield Ratio(case="all", metric="seconds_to_recover", a="30 s", b="the slowest", value=limit, target=1.0)
