"""Everything that wants a GPU, on one: tests, then tile sizes, then data and benchmarks, within 20 minutes.

Figures come after green tests only. What a GPU does not change (data, checkpoints, the planner, kernels compiled ahead
of time, faults, launching) is left to `python -m benchmarks all`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence

from benchmarks.__main__ import BENCHMARKS
from benchmarks.all import run_group
from hstu_dist.errors import UserError

log = logging.getLogger(__name__)

BENCHMARKED = ("attention", "encoder", "train_step", "inference")
"""Those whose figures are a GPU's, as far as this checkout has them."""

_WHOLE_MINUTES = 20.0
_RESERVE_MINUTES = 0.5
"""Left for ending what runs out of time."""
_TEST_MINUTES, _TUNE_MINUTES, _DATA_MINUTES = 4.0, 5.0, 2.0


def run(options: argparse.Namespace) -> int:
    """Runs the parts in order.

    Returns:
        0, or the exit code of the part that failed.

    Raises:
        UserError: there is no GPU, or a part took too long.
    """
    if options.device.type != "cuda":
        raise UserError(
            "gpu: torch finds no GPU on this machine, nothing was run", "python -m benchmarks all measures the CPU"
        )
    started = time.monotonic()
    python = sys.executable
    tests = [python, "-m", "pytest", "-q", "-m", "gpu"]
    tune = [python, "-m", "benchmarks", "attention", "--tune", "--device", "cuda"]
    data = [python, "-m", "hstu_dist", "prepare", "data=ml1m"]
    kept = "the other entries stay as they were"
    status = _part("tests", tests, _TEST_MINUTES) or _part("tile sizes", tune, _TUNE_MINUTES, without=kept)
    if status:
        return status
    # a machine without network has figures, too, and those that are missing fail by name below
    _part("data", data, _DATA_MINUTES, without="the training step will not be measured")
    left = _WHOLE_MINUTES - _RESERVE_MINUTES - (time.monotonic() - started) / 60
    only = [name for name in BENCHMARKED if name in BENCHMARKS]
    measure = [python, "-m", "benchmarks", "all", "--device", "cuda", "--within", str(int(left)), "--only", *only]
    if options.quick:
        measure += ["--quick", "--output", str(options.output)]
    return _part("benchmarks", measure, left)


def _part(name: str, command: Sequence[str], minutes: float, *, without: str | None = None) -> int:
    """Exit code of one part; one that may run out of time counts as done then, `without` says what follows."""
    log.info("%s, %.0f minutes at most", name, minutes)
    status = run_group(command, 60 * minutes)
    if status is None:
        if without is not None:
            log.warning("%s: stopped after %.0f minutes, %s", name, minutes, without)
            return 0
        raise UserError(f"gpu: {name} took more than {minutes:.0f} minutes", "run the part by hand, as logged above")
    if status:
        log.error("%s: ended with exit code %d", name, status)
    return status
