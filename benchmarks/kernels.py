"""The Triton kernels compiled ahead of time for four chips: what the assembler reports, gated against spills.

No GPU is needed, and no figure is a speed. `roofline` is a bound from the chips' published rates: the share of the
tensor cores' peak that remains when exponentials are the only other work.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks import environment
from hstu_dist.errors import UserError
from hstu_dist.ops.call import AttentionCall, Gradients
from hstu_dist.ops.spec import AttentionSpec
from hstu_dist.report.results import Ratio, Results, Row, write
from hstu_dist.report.tables import rows_table

if TYPE_CHECKING:
    from hstu_dist.ops.triton.compile_report import Report
    from hstu_dist.ops.triton.launch import Launch

log = logging.getLogger(__name__)

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDTHS = {
    "forward": (25, 32, 50, 64, 128, 256),
    "query": (25, 32, 50, 64, 128),
    "key": (25, 32, 50, 64, 128),
    "bias": (32, 64, 128),
}
"""Head widths, Q = V, that each kernel is held to; 25 and 50 are those of MovieLens-1M."""

CONTENDER = "hstu_dist"
HASH = "kernels"
"""Key of the kernels' hash among the versions of the result file."""


@dataclass(frozen=True)
class Case:
    """One kernel as it is compiled: bf16, SiLU, no special tokens."""

    architecture: str
    kernel: str
    width: int
    biased: bool

    @property
    def name(self) -> str:
        """As it appears in the result file."""
        return f"{self.architecture} {self.kernel} Q=V={self.width} {'bias' if self.biased else 'plain'}"


def cases() -> list[Case]:
    """Every case of the gate; the kernel of the bias tables runs with a bias only."""
    return [
        Case(architecture, kernel, width, biased)
        for architecture in ARCHITECTURES
        for kernel, widths in WIDTHS.items()
        for width in widths
        for biased in ((True,) if kernel == "bias" else (False, True))
    ]


def launch_of(case: Case) -> Launch:
    """The launch of a case with its default tile sizes, as a training step makes it.

    Raises:
        UserError: Triton interprets in this process, so that nothing can be compiled.
    """
    # not before it is needed: loading the kernels fixes whether Triton compiles or interprets
    import triton

    from hstu_dist.ops.triton.configs import Architecture
    from hstu_dist.ops.triton.launch import backward_launches, forward_launches, partial_tables

    if triton.knobs.runtime.interpret:
        raise UserError("kernels: Triton interprets in this process", "unset TRITON_INTERPRET")
    call, architecture = _call(case), Architecture(case.architecture)
    out, lse = torch.zeros_like(call.v), torch.zeros(0)
    q, k, v = (torch.zeros(x.shape, dtype=x.dtype) for x in (call.q, call.k, call.v))
    grads = Gradients(q, k, v, *partial_tables(call, architecture))
    launches = [
        *forward_launches(call, architecture, out, lse),
        *backward_launches(call, architecture, (out, lse), out, grads),
    ]
    return next(launch for launch in launches if launch.name == case.kernel)


def _call(case: Case) -> AttentionCall:
    """A call of two sequences of 128, q, k and v cut from one projection."""
    heads, length, longest = 4, 128, 256
    offsets = torch.tensor([0, length, 2 * length])
    columns = torch.zeros(2 * length, 3, heads, case.width, dtype=torch.bfloat16).unbind(1)
    times = torch.zeros(2 * length, dtype=torch.int64) if case.biased else None
    return AttentionCall(
        q=columns[0],
        k=columns[1],
        v=columns[2],
        offsets=offsets,
        key_offsets=offsets,
        num_contextual=None,
        num_targets=None,
        position_weight=torch.zeros(2 * longest - 1) if case.biased else None,
        time_weight=torch.zeros(129) if case.biased else None,
        query_times=times,
        key_times=times,
        max_length=length,
        max_key_length=length,
        spec=AttentionSpec(normalizer=float(longest)),
    )


def compile_case(case: Case) -> tuple[Launch, Report]:
    """Compiles a case; takes seconds."""
    from hstu_dist.ops.triton.compile_report import compile_for
    from hstu_dist.ops.triton.configs import Architecture

    launch = launch_of(case)
    return launch, compile_for(launch, Architecture(case.architecture))


def rows_of(case: Case, launch: Launch, report: Report) -> Iterator[Row]:
    """Rows of one case: its tile sizes, what the assembler reports, and what follows from that."""
    from hstu_dist.ops.triton.compile_report import occupancy, roofline
    from hstu_dist.ops.triton.configs import Architecture

    architecture = Architecture(case.architecture)
    figures: dict[str, tuple[float, str]] = {f"tile {k}": (v, "1") for k, v in asdict(launch.config).items()}
    units = {"spill_bytes": "B", "shared_bytes": "B"}
    figures |= {metric: (float(v), units.get(metric, "1")) for metric, v in asdict(report).items()}
    figures["occupancy"] = (100 * occupancy(report, architecture), "%")
    figures["roofline"] = (100 * roofline(launch.name, case.width, architecture), "%")
    for metric, (value, unit) in figures.items():
        yield Row(case=case.name, contender=CONTENDER, metric=metric, value=value, unit=unit, n=1, q25=value, q75=value)


def faults(case: Case, figure: Sequence[Row]) -> list[str]:
    """What the gate has against the rows of a case; empty if nothing."""
    from hstu_dist.ops.triton.compile_report import CHIPS
    from hstu_dist.ops.triton.configs import Architecture

    value = {row.metric: row.value for row in figure}
    limit = CHIPS[Architecture(case.architecture)].shared_limit
    found = []
    if value["spill_bytes"]:
        found.append(f"spills {value['spill_bytes']:.0f} bytes")
    if value["shared_bytes"] > limit:
        found.append(f"takes {value['shared_bytes']:.0f} bytes of shared memory, the chip has {limit}")
    if not value["tensor_ops"]:
        found.append("has no tensor-core instruction of its chip's generation")
    if value["serialized"]:
        found.append("runs its wgmma instructions one at a time")
    return found


def run(options: argparse.Namespace) -> int:
    """Compiles every case, writes `kernels.json` and a table, and fails if the gate has something against a case."""
    from hstu_dist.ops.triton.compile_report import source_hash

    # taken first: files may change while the compiler works
    versions = {**environment.versions(), HASH: source_hash()}
    rows: list[Row] = []
    bad: dict[str, list[str]] = {}
    chosen = cases()[::35] if options.quick else cases()
    for case in chosen:
        case_rows = list(rows_of(case, *compile_case(case)))
        rows += case_rows
        if found := faults(case, case_rows):
            bad[case.name] = found
        log.info("%s: %s", case.name, ", ".join(found) or "sound")
    described = environment.describe(torch.device("cpu"))
    written = Results(
        name="kernels",
        command=options.command,
        date=described.date,
        commit=described.commit,
        device="none: compiled ahead of time",
        threads=described.threads,
        versions=versions,
        rows=tuple(rows),
        ratios=tuple(_ratios(chosen, bad)),
    )
    path = write(written, options.output)
    metrics = ("registers", "spill_bytes", "shared_bytes", "tensor_ops", "occupancy", "roofline")
    sys.stdout.write(f"{rows_table(written, metrics)}\n{path}\n")
    return 1 if bad else 0


def _ratios(chosen: Sequence[Case], bad: dict[str, list[str]]) -> Iterator[Ratio]:
    for architecture in ARCHITECTURES:
        names = [case.name for case in chosen if case.architecture == architecture]
        if names:
            sound = sum(name not in bad for name in names)
            yield Ratio(
                case=architecture,
                metric="no spills, tensor cores used, within shared memory",
                a="sound kernels",
                b="kernels",
                value=sound / len(names),
                target=1.0,
            )
