"""Vocabularies on a stream whose items come and go: zero-collision hashing against a plain hash in as many bytes."""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import vocabulary_hook
from benchmarks.drift import Drift, Numbers, Period, play
from benchmarks.environment import describe
from benchmarks.options import positive
from benchmarks.study_cells import means, over_seeds, row
from benchmarks.vocabulary_hook import CUTOFF, PREFIX
from hstu_dist.commands.train import train
from hstu_dist.config import compose
from hstu_dist.distributed.table_plan import configured_plan
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.preflight import specs_of
from hstu_dist.report.plots import Curves, save_curves
from hstu_dist.report.results import Ratio, Results, Row, write
from hstu_dist.report.tables import ratios_table
from hstu_dist.train.metrics_file import read_metrics

log = logging.getLogger(__name__)

NAME = "vocabulary"
DRIFT = Drift(windows=20, users=500, events_a_user=10, topics=40, live=2000, renewed=0.125)
_QUICK = Drift(windows=4, users=128, events_a_user=4, topics=4, live=80, renewed=0.25)
ROOMY, TIGHT = "rows for 1.25 times the live ids", "rows for half of the live ids"
_ROWS = {ROOMY: 1.25, TIGHT: 0.5}
"""Of tables with zch."""

HASH, FIRST, ALL = "hash, same bytes", "static, first window", "static, all ids to come"
ZCH = {f"zch, {eviction}": eviction for eviction in ("lru", "lfu", "distance_lfu")}
HR, SHARED_EVENTS, SHARED_IDS = f"hr@{CUTOFF}", "events on shared rows", "ids on shared rows"
_RATES = {
    "vocabulary/item/admitted_per_step": "admitted a step",
    "vocabulary/item/evicted_per_step": "evicted a step",
    "vocabulary/item/collisions": "look-ups on shared rows",
}
_HOOK = f"{{target: '{vocabulary_hook.TARGET}', settings: {{stream: '${{data.path}}'}}}}"
_SETTINGS = (
    "data=stream",
    "data.settle_seconds=0",
    "data.poll_seconds=0.01",
    "data.max_length=32",
    "model.width=32",
    "nproc=1",
    "trainer.epochs=null",
    "trainer.global_batch_size=32",
    "trainer.device=cpu",
    "trainer.threads=1",
    f"trainer.evaluation={{cutoffs: [{CUTOFF}], monitor: {HR}}}",
    "trainer.logging={progress: false, tensorboard: false, report: false}",
    f"plugins=[{vocabulary_hook.__name__}]",
    f"trainer.hooks=[{_HOOK}]",
)
"""Of every run."""

PARTIAL = ("seeds",)

Lines = list[dict[str, Any]]
"""What a run logged."""


@dataclass(frozen=True)
class Contender:
    """A vocabulary in a table of some size.

    Attributes:
        case: which size.
        name: of the vocabulary.
        settings: of its run.
    """

    case: str
    name: str
    settings: tuple[str, ...]

    def follow(self, seed: int) -> Lines:
        """Trains on its stream.

        Raises:
            UserError: the run was stopped.
        """
        config = compose([*self.settings, f"seed={seed}"])
        if train(config, log.debug) != ExitCode.FINISHED:
            raise UserError(f"{self.name}: the run was stopped", "give the same command again")
        return read_metrics(config.run_dir)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument(
        "--seeds", nargs="+", type=positive, default=[1, 2, 3], metavar="SEED", help="seeds (default: 1 2 3)"
    )


def run(options: argparse.Namespace) -> int:
    """Trains every contender at every seed, and writes `vocabulary.json` and curves over the windows."""
    drift = _QUICK if options.quick else DRIFT
    measured: list[Row] = []
    curves: Curves = {f"{metric}, {case}": {} for case in _ROWS for metric in (HR, SHARED_IDS)}
    for seed in options.seeds[:1] if options.quick else options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for one in contenders(drift, seed, Path(folder), list(ZCH)[-1:] if options.quick else list(ZCH)):
                log.info("seed %d, %s, %s", seed, one.case, one.name)
                lines = one.follow(seed)
                measured += figures(one, lines, drift.windows // 2)
                for metric in (HR, SHARED_IDS):
                    points = [(int(window[f"{PREFIX}window"]), window[PREFIX + metric]) for window in windows_of(lines)]
                    curves[f"{metric}, {one.case}"][f"{one.name}_seed{seed}"] = points
    rows = list(means(measured))
    found = Results(
        name=NAME,
        command=options.command,
        rows=tuple(rows),
        ratios=tuple(ratios(rows)),
        **asdict(describe(options.device)),
    )
    path = write(found, options.output)
    stem = options.output / f"{NAME}_windows"
    save_curves(curves, "every window predicted before it is trained on", stem, over="window")
    sys.stdout.write(f"{ratios_table(found)}\n{path}\n")
    return 0


def contenders(drift: Drift, seed: int, folder: Path, policies: Sequence[str]) -> Iterator[Contender]:
    """All of one seed, with some of `ZCH`, whose streams and runs lie in `folder`.

    A table without zch gets as many more rows as take the bytes that zch takes beside its rows.
    """
    periods = list(drift.periods(seed))
    play(periods, folder / "raw")
    raw = (*_SETTINGS, f"output={folder}/runs", f"data.path={folder}/raw", "data.item_ids=raw")
    for number, (case, share) in enumerate(_ROWS.items()):
        rows = round(drift.live * share)
        for name in policies:
            vocabulary = f"embedding.vocabulary={{kind: zch, eviction: {ZCH[name]}}}"
            yield Contender(case, name, (*raw, f"name={ZCH[name]}_{number}", f"data.num_items={rows}", vocabulary))
        more = rows * bytes_per_row("zch") // bytes_per_row("hash")
        vocabulary = "embedding.vocabulary.kind=hash"
        yield Contender(case, HASH, (*raw, f"name=hash_{number}", f"data.num_items={more}", vocabulary))
        if case == ROOMY:
            yield from _numbered(periods, more, folder)


def _numbered(periods: Sequence[Period], rows: int, folder: Path) -> Iterator[Contender]:
    """A floor, a vocabulary that was made once, and a ceiling, one that knows the future and has rows for all of it."""
    for name, numbers in ((FIRST, Numbers.of_most(periods[:1], rows - 1)), (ALL, Numbers.of_all(periods))):
        stream = folder / name.partition(", ")[2].replace(" ", "_")
        play(periods, stream, numbers)
        own = (f"name={stream.name}", f"data.path={stream}", f"data.num_items={len(numbers)}", "data.item_ids=dense")
        yield Contender(ROOMY, name, (*_SETTINGS, f"output={folder}/runs", *own))


def bytes_per_row(kind: str) -> int:
    """Of a table's weights, optimizer state and vocabulary."""
    rows = 1024
    own = ["name=size", "data.path=none", "data.item_ids=raw", f"data.num_items={rows}"]
    specs = specs_of(compose([*_SETTINGS, *own, f"embedding.vocabulary.kind={kind}"]), rows)
    return sum(configured_plan(specs, 1).bytes_per_rank(specs)) // rows


def windows_of(lines: Lines) -> Lines:
    """Those that have a ranking of ids."""
    return [line for line in lines if f"{PREFIX}window" in line]


def figures(contender: Contender, lines: Lines, first: int) -> Iterator[Row]:
    """Means over the windows from `first` on, when the items of the beginning are mostly gone."""
    later = windows_of(lines)[first:]
    for metric in (HR, SHARED_EVENTS, SHARED_IDS):
        yield row(contender.case, contender.name, metric, statistics.fmean(line[PREFIX + metric] for line in later))
    for logged, metric in _RATES.items():
        values = [line[logged] for line in lines if logged in line and line["step"] > later[0]["step"]]
        if values:
            yield row(contender.case, contender.name, metric, statistics.fmean(values))


def ratios(rows: Sequence[Row]) -> Iterator[Ratio]:
    """Every zch over hashing, and over knowing the future."""
    found = {(one.case, one.contender): one for one in rows if one.metric == HR}
    for (case, name), ours in found.items():
        for other, target in ((HASH, 1.0), (ALL, None)):
            theirs = found.get((case, other))
            if name in ZCH and theirs is not None and theirs.value:
                metric, value = over_seeds(HR, ours.n, theirs.n), ours.value / theirs.value
                yield Ratio(case=case, metric=metric, a=name, b=other, value=value, target=target)
