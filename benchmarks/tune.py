"""Finding Triton tile sizes on the GPU at hand: a hill climb from the table that compile reports gave."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from benchmarks.attention_cases import Case, spread_lengths
from benchmarks.attention_contenders import Implementation, hstu
from benchmarks.attention_problem import Expected, expected, make_problem
from benchmarks.harness import Effort, clock_of, compare
from hstu_dist.errors import UserError
from hstu_dist.ops.spec import Backend

if TYPE_CHECKING:
    from hstu_dist.ops.triton.configs import Config, Key, Table

log = logging.getLogger(__name__)

Place = TypeVar("Place")

TOLERANCE = 3e-2
"""Largest relative error of a config in bf16."""

GAIN = 1.02
"""How much faster a neighbour must be to be taken: less is noise."""

EFFORT = Effort(budget_seconds=2.0, min_rounds=5, max_rounds=30, warm_up_seconds=0.05)


def run(options: argparse.Namespace) -> int:
    """Tunes every entry of this GPU's table and writes the table that the package reads.

    Raises:
        UserError: there is no GPU.
    """
    device: torch.device = options.device
    if device.type != "cuda":
        raise UserError(
            f"--tune: got device {device}, expected a GPU, because tile sizes are timed on it", "run it where one is"
        )
    # not before a GPU is known to be there: loading the kernels fixes whether Triton compiles or interprets
    from hstu_dist.ops.triton import configs
    from hstu_dist.ops.triton.launch import architecture_of

    table, architecture = configs.default_table(), architecture_of(device)
    for key in sorted(key for key in table if key.architecture is architecture and key.width):
        start = table[key]
        bench = Bench.of(key, table, device, forward_only=key.kernel is configs.Kernel.FORWARD)
        table[key] = climb(start, neighbours, bench.rank)
        log.info("%s: %s -> %s", key, start, table[key])
        # at once, so that a run which is stopped keeps what it found
        configs.write_table(configs.TABLE_PATH, table)
    sys.stdout.write(f"{configs.TABLE_PATH}\nits compile reports are out of date: run python -m benchmarks kernels\n")
    return 0


def climb(
    start: Place,
    neighbours: Callable[[Place], Iterable[Place]],
    rank: Callable[[Sequence[Place]], dict[Place, float]],
) -> Place:
    """Moves to the fastest neighbour until none is clearly faster than where it stands.

    Args:
        start: where to begin.
        neighbours: what is one step away.
        rank: seconds of each of the given places that works; the others are left out.

    Returns:
        The place no neighbour of which is faster by `GAIN`.
    """
    best = start
    while True:
        seconds = rank((best, *neighbours(best)))
        fastest = min(seconds, key=seconds.__getitem__, default=best)
        if fastest == best or seconds.get(best, math.inf) <= GAIN * seconds[fastest]:
            return best
        best = fastest


def neighbours(config: Config) -> Iterator[Config]:
    """Configs one step away: tiles and warps halved or doubled, one pipeline stage more or less."""
    for field, least, most in (("queries", 16, 256), ("keys", 16, 256), ("warps", 2, 8)):
        for value in (getattr(config, field) // 2, getattr(config, field) * 2):
            if least <= value <= most:
                yield replace(config, **{field: value})
    for stages in (config.stages - 1, config.stages + 1):
        if 1 <= stages <= 4:
            yield replace(config, stages=stages)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A bf16 problem that ranks the configs of one entry by the step that runs its kernel.

    Attributes:
        key: the entry.
        table: the table that launches read; candidates are put into it to be tried.
        implementation: the Triton backend on the problem.
        exact: what it must compute.
        forward_only: the kernel is the forward's; the others run in a training step.
    """

    key: Key
    table: Table
    implementation: Implementation
    exact: Expected
    forward_only: bool

    @classmethod
    def of(cls, key: Key, table: Table, device: torch.device, *, forward_only: bool) -> Bench:
        """A bench for one entry."""
        lengths = spread_lengths(100, 2048, 8)
        case = Case(key="tune", name=str(key), lengths=lengths, heads=4, width=key.width, bias=key.biased)
        problem = make_problem(case, device, torch.bfloat16)
        return cls(
            key=key,
            table=table,
            implementation=hstu(problem, Backend.TRITON),
            exact=expected(problem, problem.hstu_spec(Backend.BLOCKED), bias=case.bias),
            forward_only=forward_only,
        )

    def rank(self, candidates: Sequence[Config]) -> dict[Config, float]:
        """Median seconds of each config that the chip can run and that is right; leaves the table as it was."""
        before = self.table[self.key]
        try:
            steps = {str(config): partial(self._step, config) for config in candidates if self._is_right(config)}
            timings = compare(steps, EFFORT, clock_of(self.exact.rows.device))
            return {c: timings.seconds[str(c)].median for c in candidates if str(c) in steps}
        finally:
            self.table[self.key] = before

    def _step(self, config: Config) -> object:
        self.table[self.key] = config
        return self.implementation.forward() if self.forward_only else self.implementation.training()

    def _is_right(self, config: Config) -> bool:
        self.table[self.key] = config
        try:
            return self.implementation.error(self.exact) <= TOLERANCE
        except Exception as error:
            # tiles that exceed the chip fail in the compiler or at launch, each with an error type of its own
            log.info("%s: %s not usable (%s)", self.key, config, error)
            return False
