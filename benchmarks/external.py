r"""Any other program beside this package's training step: the same data, in turn, in one run.

The program is a command; what it did is read from its output by a regular expression with a group `tokens` and, if it
times itself, a group `seconds`. All matches are added up, those of its warm-up left out; without `seconds` the time is
that of the whole process. In the command `{data}` stands for the folder of the prepared sequences (Parquet, as
`python -m hstu_dist prepare` writes it), and `{events}` for the same as CSV (user_id, item_id, timestamp), which exists
where the sequences are made up here by one of the encoder benchmark's laws of length.

    python -m benchmarks external --command 'python peer.py {data}' \
        --pattern 'tokens=(?P<tokens>\d+) seconds=(?P<seconds>\S+)'
"""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks import encoder_cases as cases
from benchmarks import environment
from benchmarks.environment import ROOT
from benchmarks.harness import Samples, turns
from benchmarks.options import positive
from benchmarks.ranks import ask_ranks
from benchmarks.train_step_worker import Answer, Request
from hstu_dist.data.config import EventsConfig
from hstu_dist.data.prepare import prepare
from hstu_dist.data.schema import MANIFEST_FILE
from hstu_dist.errors import UserError
from hstu_dist.report.results import Ratio, Results, write
from hstu_dist.report.tables import ratios_table, rows_table

log = logging.getLogger(__name__)

OURS = "hstu_dist"
RATE = "tokens/s"
PARTIAL = ("program",)
"""What others measure is nobody's committed result."""

_HELD_OUT = 3
"""Events of a history that no training position reads: the last target, validation and test."""
_ITEMS = 1000
_SHOWN_LINES = 5


@dataclass(frozen=True, kw_only=True)
class Program:
    """A command that trains on something and says how much.

    Attributes:
        command: program and arguments, their placeholders filled in.
        pattern: finds the tokens, and the seconds if it has that group, in its output.
        skip: matches of its warm-up.
        timeout: seconds it may take.
    """

    command: tuple[str, ...]
    pattern: re.Pattern[str]
    skip: int
    timeout: float

    def rate(self) -> float:
        """Tokens per second of one run.

        Raises:
            UserError: it cannot be started, fails, takes too long, or says nothing that the pattern finds.
        """
        shown = shlex.join(self.command)
        started = time.perf_counter()
        try:
            done = subprocess.run(
                self.command, capture_output=True, text=True, check=False, timeout=self.timeout, cwd=ROOT
            )
        except OSError as error:
            raise UserError(f"--command: {shown} cannot be started ({error.strerror})", "check the program") from error
        except subprocess.TimeoutExpired as error:
            raise UserError(f"--command: {shown} took more than {self.timeout:g} s", "raise --timeout") from error
        wall = time.perf_counter() - started
        said = done.stdout + done.stderr
        if done.returncode:
            raise UserError(f"--command: {shown} ended with exit code {done.returncode}: {_end_of(said)}", "")
        return self.read(said, wall)

    def read(self, said: str, wall: float) -> float:
        """Tokens per second by a program's output, or by `wall` seconds if the pattern has no such group.

        Raises:
            UserError: nothing that counts is in the output.
        """
        found = list(self.pattern.finditer(said))[self.skip :]
        try:
            tokens = sum(_number(match["tokens"]) for match in found)
            timed = "seconds" in self.pattern.groupindex
            seconds = sum(_number(match["seconds"]) for match in found) if timed else wall
        except (TypeError, ValueError) as error:
            raise UserError(f"--pattern: found no number ({error})", "let its groups match digits alone") from error
        if not tokens > 0 or not seconds > 0:
            raise UserError(
                f"--pattern: {self.pattern.pattern!r} found {len(found)} matches after the first {self.skip}, "
                f"{tokens:g} tokens and {seconds:g} seconds; the output ends with: {_end_of(said)}",
                "the program must say how many tokens it trained on",
            )
        return tokens / seconds


def _number(text: str) -> float:
    return float(text.replace(",", "").replace("_", ""))


def _end_of(said: str) -> str:
    return " / ".join(said.strip().splitlines()[-_SHOWN_LINES:]) or "nothing was said"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--command", dest="program", required=True, help="with {data} or {events}")
    parser.add_argument("--pattern", required=True, help="regular expression with a group tokens, perhaps seconds")
    parser.add_argument("--name", default="external", help="of the program in the table (default: %(default)s)")
    parser.add_argument("--skip", type=int, default=0, help="matches of its warm-up (default: %(default)s)")
    parser.add_argument("--timeout", type=positive, default=600, help="seconds of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data/ml1m"), help="prepared folder (default: %(default)s)")
    parser.add_argument(
        "--law", choices=("full", "ragged"), help="make up sequences instead; see the encoder benchmark"
    )
    parser.add_argument("--longest", type=positive, default=200, help="N, tokens at most (default: %(default)s)")
    parser.add_argument("--sequences", type=positive, default=512, help="of --law (default: %(default)s)")
    parser.add_argument("--experiment", default="ml1m_hstu", help="what ours trains (default: %(default)s)")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="added to ours")
    parser.add_argument("--steps", type=positive, default=10, help="steps of ours in a run (default: %(default)s)")
    parser.add_argument("--nproc", type=positive, default=1, help="ranks of ours (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Runs both in turn and writes `external.json`.

    Raises:
        UserError: the pattern, the data or the program does not do.
    """
    pattern = _pattern(options.pattern)
    places = _places(options)
    command = tuple(_filled(part, places) for part in shlex.split(options.program))
    if not command:
        raise UserError("--command: got nothing", "give a program and its arguments")
    program = Program(command=command, pattern=pattern, skip=options.skip, timeout=options.timeout)
    rates: dict[str, list[float]] = {OURS: [], options.name: []}
    measures = {OURS: lambda: ours(options, places), options.name: program.rate}
    for name in turns(tuple(rates), options.rounds):
        rates[name].append(measures[name]())
        log.info("%s: %.4g tokens/s", name, rates[name][-1])
    found = _results(options, {name: Samples(tuple(values)) for name, values in rates.items()})
    sys.stdout.write(f"{rows_table(found)}\n{ratios_table(found)}\n{write(found, options.output)}\n")
    return 0


def _pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(
            f"--pattern: got {text!r}, no regular expression ({error})", "see Python's module re"
        ) from error
    if "tokens" not in pattern.groupindex:
        raise UserError(f"--pattern: got {text!r} without a group tokens", r"such as 'tokens: (?P<tokens>\d+)'")
    return pattern


def _places(options: argparse.Namespace) -> dict[str, str]:
    """What the placeholders stand for."""
    if options.name == OURS:
        raise UserError(f"--name: got {OURS}, which is ours", "name the other program")
    if options.law is not None:
        return _made_up(options)
    if not (options.data / MANIFEST_FILE).exists():
        raise UserError(f"--data: {options.data} holds no prepared data set", "make data, or use --law ragged")
    return {"data": str(options.data.resolve())}


def _filled(part: str, places: Mapping[str, str]) -> str:
    if "{events}" in part and "events" not in places:
        raise UserError("--command: {events} exists with --law only", "read {data}, or add --law ragged")
    for name, value in places.items():
        part = part.replace(f"{{{name}}}", value)
    return part


def _made_up(options: argparse.Namespace) -> dict[str, str]:
    """Random items in sequences whose training inputs follow the law of lengths."""
    batch = getattr(cases, options.law)(options.longest, options.sequences)
    folder = options.scratch.resolve() / "external"
    events, prepared = folder / "events.csv", folder / "prepared"
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    with events.open("w") as file:
        file.write("user_id,item_id,timestamp\n")
        for user, length in enumerate(batch.lengths):
            items = random.integers(_ITEMS, size=length + _HELD_OUT)
            file.writelines(f"{user},{item},{10**9 + 60 * place}\n" for place, item in enumerate(items.tolist()))
    prepare(EventsConfig(input=str(events), path=str(prepared), max_length=options.longest))
    return {"data": str(prepared), "events": str(events)}


def ours(options: argparse.Namespace, places: Mapping[str, str]) -> float:
    """Tokens per second of this package's training steps, data loading left out."""
    overrides = [f"experiment={options.experiment}", f"data.path={places['data']}", f"nproc={options.nproc}"]
    overrides.append(f"trainer.device={options.device.type}")
    if "events" in places:
        overrides += ["data=events", f"data.input={places['events']}", f"data.max_length={options.longest}"]
    if options.threads is not None:
        overrides.append(f"trainer.threads={options.threads}")
    request = Request(overrides=[*overrides, *options.override], steps=options.steps)
    answer = Answer(**ask_ranks("benchmarks.train_step_worker", options.nproc, request, "its messages are above"))
    return sum(answer.tokens) / sum(answer.seconds)


def _results(options: argparse.Namespace, rates: Mapping[str, Samples]) -> Results:
    case = f"{options.law} lengths up to {options.longest}" if options.law else f"{options.data.name}"
    paired = zip(rates[OURS].values, rates[options.name].values, strict=True)
    value = Samples(tuple(a / b for a, b in paired)).median
    return Results(
        name="external",
        command=options.command,
        **asdict(environment.describe(options.device)),
        rows=tuple(samples.row(case, name, RATE, "1/s") for name, samples in rates.items()),
        ratios=(Ratio(case=case, metric=RATE, a=OURS, b=options.name, value=value),),
    )
