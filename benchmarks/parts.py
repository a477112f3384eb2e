"""A measurement of several parts with one result file; interrupted, it goes on with the part that is missing."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch

from benchmarks import environment
from benchmarks.cells import Cells, Findings
from hstu_dist.report.results import Results, write

log = logging.getLogger(__name__)


def run_parts(
    name: str, parts: Mapping[str, Callable[[], Findings]], options: argparse.Namespace, device: torch.device
) -> int:
    """Measures what is not measured yet and writes the result file.

    Args:
        name: of the result file.
        parts: in the order of the tables; names are those of files.
        options: of the command, see `benchmarks.__main__.Benchmark.run`.
        device: what is measured.

    Returns:
        The exit status.
    """
    here = environment.describe(device)
    stamp = {
        "code": environment.source_hash(),
        "device": here.device,
        "threads": str(here.threads),
        "versions": json.dumps(here.versions),
        "quick": str(options.quick),
    }
    cells = Cells(options.scratch / f"{name}_cells", stamp)
    findings = Findings()
    for part, measure in parts.items():
        findings.add(cells.measure(part, measure))
    results = Results(
        name=name,
        command=options.command,
        rows=tuple(findings.rows),
        ratios=tuple(findings.ratios),
        **asdict(environment.describe(device)),
    )
    log.info("written to %s", write(results, options.output))
    cells.clear()
    return 0
