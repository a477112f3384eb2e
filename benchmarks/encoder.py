"""Encoder: HSTU layers against Transformer layers on flash attention, in original sequences per second.

The paper's figure: D 512, H 8, Q 64, lengths from 1k to 8k, Stochastic Length, raggedness; fp32 on a CPU, where torch's
flash attention stands in for FlashAttention2, and bf16 on a GPU. Every contender is checked against float64 first and
timed in turn with the others of its length; `encoder_cases` states the laws of length. A padded Transformer spends the
same on every batch, so that its batch of full sequences is the baseline of all. Positions are learned and added before
the first layer, alike for all and outside of what is timed, unless `--positions rotary` turns the Transformer's
queries and keys instead.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import encoder_cases as cases
from benchmarks import environment
from benchmarks.ceilings import Ceilings, Work
from benchmarks.cells import Cells, Findings
from benchmarks.encoder_contenders import AGAIN, Entry, Roster
from benchmarks.encoder_stacks import Machine, saved_bytes
from benchmarks.flash import NAMES, FlashAttention, implementation, installed
from benchmarks.harness import Contender, Effort, Samples, Timings, clock_of, compare, refuse_wrong
from benchmarks.memory import memory_limited, peak_extra_mb
from benchmarks.options import positive
from hstu_dist.models.flops import count_flops
from hstu_dist.report.plots import save_lines
from hstu_dist.report.results import Ratio, Results, Row, write
from hstu_dist.report.tables import ratios_table

log = logging.getLogger(__name__)

TRAINING, INFERENCE = "training", "inference"
RATE = "sequences/s"
OUT_OF_MEMORY = "out of memory"
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 6e-2}
"""Largest relative error; a wrong mask or scale is far above."""

TARGETS: Mapping[tuple[str, int, str], float] = {
    (TRAINING, 8192, "HSTU, SL 1.6"): 15.2,
    (TRAINING, 8192, "HSTU, ragged"): 5.3,
    (TRAINING, 8192, "HSTU, full"): 1.8,
    (INFERENCE, 8192, "HSTU, ragged"): 5.6,
}
"""Least rate over the padded Transformer's, by mode, N and contender."""

ACTIVATIONS_TARGET = 2.3
"""Activations of a Transformer layer over those of an HSTU layer; the paper counts 33·D against 14·D bytes."""

NOISE = 1.03
"""Largest ratio, either way, of one contender timed under two names."""

PARTIAL = ("lengths", "alphas", "contenders", "layers", "positions")
"""Options that make a run a part, which does not touch the committed results."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How this run measures.

    Attributes:
        machine: where, in what, how many layers.
        lengths: N of each comparison.
        roster: who is compared.
        effort: how long.
        tiny: a smoke run.
    """

    machine: Machine
    lengths: tuple[int, ...]
    roster: Roster
    effort: Effort
    tiny: bool


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--lengths", nargs="+", type=positive, metavar="N", help="longest lengths (default: 1k to 8k)")
    parser.add_argument(
        "--alphas",
        nargs="+",
        type=_alpha,
        metavar="A",
        help="of Stochastic Length (default: 1.5 to 1.9; 2 cuts nothing)",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        help=f"attention of the Transformer, of {', '.join(NAMES)} (default: all that are installed)",
    )
    parser.add_argument("--layers", type=positive, help="of each stack (default: 1 on a CPU, 4 on a GPU)")
    parser.add_argument("--positions", choices=("learned", "rotary"), default="learned", help="of the Transformer")
    parser.add_argument("--rounds", type=positive, default=3, help="rounds at least (default: %(default)s)")


def _alpha(text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = 0.0
    if not 1 < alpha < 2:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number between 1 and 2")
    return alpha


def run(options: argparse.Namespace) -> int:
    """Measures what is not measured yet and writes `encoder_<device>` with its figure.

    Returns:
        0, or 1 if a contender computed something wrong.

    Raises:
        UserError: a contender is unknown, not installed or of the wrong version.
    """
    flashes, missing = _flashes(options)
    settings = settings_for(options, flashes)
    name = f"encoder_{environment.device_slug(options.device)}"
    sound, refused = _checked(settings)
    cells = Cells(options.scratch / f"{name}_cells", _stamp(options, settings))
    findings = Findings(refused=refused)
    with memory_limited(options.device):
        findings.add(cells.measure("activations", partial(_activations, settings)))
        for mode in (TRAINING, INFERENCE):
            for longest in settings.lengths:
                cell = f"{mode}_{longest}"
                findings.add(cells.measure(cell, partial(compared, mode, longest, sound, settings)))
        # on a CPU each takes a process of its own
        for longest in settings.lengths if options.device.type == "cuda" else settings.lengths[-1:]:
            findings.add(cells.measure(f"memory_{longest}", partial(_weighed, longest, settings)))
    _report(name, findings, options, {f.name: f.version for f in flashes} | missing)
    cells.clear()
    return 1 if findings.refused else 0


def _flashes(options: argparse.Namespace) -> tuple[list[FlashAttention], dict[str, str]]:
    """Those asked for, each of which must run; else those that do, and why the others do not."""
    if options.contenders:
        return [implementation(name, options.device) for name in dict.fromkeys(options.contenders)], {}
    found, missing = installed(options.device)
    for reason in missing.values():
        log.info("left out: %s", reason)
    return found, missing


def settings_for(options: argparse.Namespace, flashes: list[FlashAttention]) -> Settings:
    """How to measure on a device."""
    on_gpu = options.device.type == "cuda"
    layers = options.layers or (4 if on_gpu else 1)
    machine = Machine(device=options.device, dtype=torch.bfloat16 if on_gpu else torch.float32, layers=layers)
    effort = Effort(min_rounds=options.rounds, max_rounds=15)
    lengths = tuple(sorted(options.lengths or ((64,) if options.quick else cases.LENGTHS)))
    return Settings(
        machine=machine,
        lengths=lengths,
        roster=Roster(
            flashes=tuple(flashes),
            rotary=options.positions == "rotary",
            alphas=tuple(options.alphas or ((1.6,) if options.quick else cases.ALPHAS)),
            full_count=8 if on_gpu else 1,
            ragged_count=32 if on_gpu else 8,
        ),
        effort=replace(effort, budget_seconds=0.2, min_rounds=2, warm_up_seconds=0) if options.quick else effort,
        tiny=options.quick,
    )


def _stamp(options: argparse.Namespace, settings: Settings) -> dict[str, str]:
    here = environment.describe(options.device)
    flashes = {flash.name: flash.version for flash in settings.roster.flashes}
    asked = {name: getattr(options, name) for name in ("alphas", "layers", "positions", "rounds", "quick")}
    return {
        "code": environment.source_hash(),
        "device": here.device,
        "threads": str(here.threads),
        "versions": json.dumps(here.versions | flashes),
        "settings": json.dumps(asked),
    }


def _checked(settings: Settings) -> tuple[set[str], list[str]]:
    """Kinds of contenders that compute the right thing over a small batch, and why the others do not."""
    machine = settings.machine
    small = cases.Batch("check", (5, 33, 64, 1), 64)
    kinds = {entry.kind: entry for entry in settings.roster.entries(small.longest, training=False)}
    contenders = [
        Contender(name=kind, steps={}, error=partial(entry.error, small, machine)) for kind, entry in kinds.items()
    ]
    checked = refuse_wrong(contenders, TOLERANCE[machine.dtype])
    return {contender.name for contender in checked.sound}, list(checked.refused)


def compared(mode: str, longest: int, sound: set[str], settings: Settings) -> Findings:
    """Times all contenders of a length in turn.

    Args:
        mode: TRAINING or INFERENCE.
        longest: N.
        sound: kinds of contenders that take part.
        settings: how to measure.
    """
    machine, training = settings.machine, mode == TRAINING
    entries = [e for e in settings.roster.entries(longest, training=training) if e.kind in sound]
    ceilings = Ceilings.of(machine.device, machine.dtype, tiny=settings.tiny)
    steps = {entry.name: entry.step(machine, training=training) for entry in entries}
    timings = compare({**steps, **ceilings.steps}, settings.effort, clock_of(machine.device))
    case = _case(longest, mode)
    findings = Findings()
    findings.rows += ceilings.rows(case, timings)
    for entry in entries:
        if entry.name in timings.out_of_memory:
            findings.rows.append(_one(case, entry.name, OUT_OF_MEMORY, 1, ""))
        else:
            findings.rows += _rows(case, entry, mode, timings, ceilings, machine)
    findings.ratios += _ratios(mode, longest, entries, timings)
    return findings


def _case(longest: int, mode: str) -> str:
    return f"N {longest}, {mode}"


def _rows(case: str, entry: Entry, mode: str, timings: Timings, ceilings: Ceilings, machine: Machine) -> Iterator[Row]:
    seconds = timings.seconds[entry.name]
    work = needed(entry, machine, training=mode == TRAINING)
    yield seconds.map(lambda s: s * 1e3).row(case, entry.name, "time", "ms")
    for metric, unit, amount in (
        (RATE, "1/s", float(len(entry.batch.lengths))),
        ("tokens/s", "1/s", float(entry.batch.tokens)),
        ("rate", "GFLOP/s", work.flops / 1e9),
    ):
        yield seconds.map(lambda s, amount=amount: amount / s).row(case, entry.name, metric, unit)  # type: ignore[misc]
    for metric, samples in ceilings.shares(entry.name, work, timings):
        yield samples.row(case, entry.name, metric, "1")


def needed(entry: Entry, machine: Machine, *, training: bool) -> Work:
    """FLOPs, causal half only and no padding, and bytes that a step must move at least.

    Forward: weights, input and output once. Training moves besides what the layers keep, written and read again, the
    weights once more with their gradients, and the gradients of input and output.
    """
    config = entry.config(machine.layers)
    count = count_flops(config, entry.batch.work, scores_per_token=0)
    element = torch.empty(0, dtype=machine.dtype).element_size()
    edges = 2.0 * entry.batch.tokens * cases.WIDTH * element
    weights = 12.0 if entry.is_transformer else 5.0
    stored = weights * cases.WIDTH**2 * machine.layers * element
    if not training:
        return Work(flops=count.forward, bytes=edges + stored)
    kept = entry.kept_elements(machine) * entry.batch.tokens * machine.layers * element
    return Work(flops=count.training, bytes=2 * edges + 3 * stored + 2 * kept)


def _ratios(mode: str, longest: int, entries: list[Entry], timings: Timings) -> Iterator[Ratio]:
    timed = [entry for entry in entries if entry.name in timings.seconds]
    case = _case(longest, mode)
    padded = [entry for entry in timed if entry.padded]
    ours = [entry for entry in timed if not entry.is_transformer and not entry.name.endswith(AGAIN)]
    for baseline in padded:
        for entry in ours:
            # held to the first: FlashAttention2 where it is installed
            target = TARGETS.get((mode, longest, entry.name)) if baseline is padded[0] else None
            yield _ratio(case, entry, baseline, timings, target)
    for jagged in (entry for entry in timed if entry.is_transformer and not entry.padded):
        for entry in ours:
            if entry.batch.name == jagged.batch.name:
                yield _ratio(case, entry, jagged, timings, None)
    for entry in timed:
        if f"{entry.name}{AGAIN}" in timings.seconds:
            noise = timings.speed_ratio(entry.name, f"{entry.name}{AGAIN}").median
            yield Ratio(case=case, metric=RATE, a=entry.name, b=f"{entry.name}{AGAIN}", value=noise)
            value = NOISE / max(noise, 1 / noise)
            yield Ratio(case=case, metric="noise", a=f"limit {NOISE:g}", b="the same twice", value=value, target=1.0)


def _ratio(case: str, a: Entry, b: Entry, timings: Timings, target: float | None) -> Ratio:
    sequences = len(a.batch.lengths) / len(b.batch.lengths)
    value = timings.speed_ratio(a.name, b.name).median * sequences
    return Ratio(case=case, metric=RATE, a=a.name, b=b.name, value=value, target=target)


def _activations(settings: Settings) -> Findings:
    """Bytes that one layer keeps for the backward of one token."""
    machine = replace(settings.machine, layers=2)
    batch = cases.full(64 if settings.tiny else 1024, 1)
    case, metric = "activations", "bytes per layer and token"
    findings, kept = Findings(), {}
    for entry in settings.roster.entries(batch.longest, training=True):
        if entry.batch.name != "full" or entry.name.endswith(AGAIN):
            continue
        kept[entry.name] = saved_bytes(entry.build(batch, machine)) / batch.tokens / machine.layers
        findings.rows.append(_one(case, entry.name, metric, kept[entry.name], "B"))
        element = torch.empty(0, dtype=machine.dtype).element_size()
        findings.rows.append(_one(case, entry.name, "elements over D", kept[entry.name] / element / cases.WIDTH, "1"))
    ours, *others = kept
    for name in (other for other in others if not other.startswith("HSTU")):
        value = kept[name] / kept[ours]
        target = ACTIVATIONS_TARGET
        findings.ratios.append(Ratio(case=case, metric=metric, a=name, b=ours, value=value, target=target))
    return findings


def _weighed(longest: int, settings: Settings) -> Findings:
    """Peak extra memory of a training step over one batch."""
    machine, findings = settings.machine, Findings()
    case, metric, peaks = _case(longest, TRAINING), "peak extra memory", {}
    tiny = cases.Batch("rehearsal", (5, 64), 64)
    for entry in settings.roster.entries(longest, training=True):
        if entry.name.endswith(AGAIN) or entry.batch.name not in ("full", "ragged"):
            continue
        build, rehearsal = (partial(entry.of(b).step, machine, training=True) for b in (entry.batch, tiny))
        peak = peak_extra_mb(build, rehearsal, machine.device)
        if peak is None:
            findings.rows.append(_one(case, entry.name, OUT_OF_MEMORY, 1, ""))
            continue
        peaks[entry.name] = peak / len(entry.batch.lengths)
        findings.rows.append(_one(case, entry.name, metric, peak, "MB"))
    # a sequence in the baseline's layout over one in ours
    for name in (n for n in peaks if n.endswith("padded")):
        if "HSTU, full" in peaks:
            value = peaks[name] / peaks["HSTU, full"]
            findings.ratios.append(Ratio(case=case, metric=metric, a=name, b="HSTU, full", value=value))
    return findings


def _one(case: str, contender: str, metric: str, value: float, unit: str) -> Row:
    return Samples((value,)).row(case, contender, metric, unit)


def _report(name: str, findings: Findings, options: argparse.Namespace, flashes: dict[str, str]) -> None:
    here = environment.describe(options.device)
    found = Results(
        name=name,
        command=options.command,
        **asdict(replace(here, versions=here.versions | flashes)),
        rows=tuple(findings.rows),
        ratios=tuple(findings.ratios),
    )
    folder: Path = options.output
    path = write(found, folder)
    draw(found, folder)
    sys.stdout.write(f"{ratios_table(found)}\n{path}\n")
    for reason in findings.refused:
        sys.stdout.write(f"refused, no row: {reason}\n")


def draw(found: Results, folder: Path) -> tuple[Path, Path]:
    """The figure of a result file: paths of PNG and SVG."""
    title = f"{found.name} on {found.device}, commit {found.commit[:12]}"
    return save_lines(speedups(found), (title, "N, longest sequence", "times faster"), folder / f"{found.name}_speedup")


def speedups(found: Results) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Original sequences per second over the first padded Transformer: panel → line → [(N, ratio)]."""
    padded = [ratio.b for ratio in found.ratios if ratio.metric == RATE and ratio.b.endswith("padded")]
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for ratio in found.ratios:
        if ratio.metric == RATE and ratio.b == padded[0]:
            longest, mode = ratio.case.removeprefix("N ").split(", ")
            line = panels.setdefault(f"{mode}: over {ratio.b}", {}).setdefault(ratio.a, [])
            line.append((int(longest), ratio.value))
    return panels
