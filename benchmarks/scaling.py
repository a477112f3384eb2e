"""Scaling laws: the sweeps of conf/sweep, the laws fitted to them, and how well the law told the largest run.

A cell of a sweep is a run like any other: it resumes, and is skipped once finished. The fits go to a folder beside the
summary, so that a lost run folder loses no figure.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import environment
from benchmarks.options import positive
from benchmarks.study_cells import row
from hstu_dist.commands.scale import fit
from hstu_dist.config import compose
from hstu_dist.data.prepare import prepare
from hstu_dist.errors import ExitCode
from hstu_dist.report.results import Ratio, Results, Row, write
from hstu_dist.scaling.law import Fit
from hstu_dist.scaling.study import Study
from launch.__main__ import main as launch

NAME = "scaling_law"
FITS = "scaling"
"""Folder of the fits, beside the summary."""
SCALING = "scaling"
SWEEPS: Mapping[str, tuple[str, ...]] = {SCALING: ("loss", "hr@10"), "isoflop": ("loss",)}
"""Each is conf/sweep/NAME.yaml, with the metrics to be fitted; the loss is first."""
OURS, BASELINE = "scaling_hstu", "scaling_sasrec"
PARTIAL = ("sweeps",)
_ERROR, _R_SQUARED = 0.03, 0.98
"""Of the held-out loss, at most; of the loss of each model, at least."""
_CORES, _HOURS = 2, 4
"""That the ladder may take, with one thread a run."""
_TINY = (
    "data.num_records=1200",
    "data.num_items=60",
    "data.num_categories=6",
    "task.records={train:64,evaluated:20}",
    "trainer.global_batch_size=16",
)
_TINY_CELLS = ("size=s01,s02,s03,s04", f"experiment={OURS}")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sweeps:
    """What both sweeps share.

    Attributes:
        runs: folder of a folder for each sweep.
        output: folder of result files.
        settings: overrides of every cell.
        cells: overrides that replace a sweep's own cells.
        jobs: runs at the same time.
        threads: of a run.
        device: of a run.
        command: what to type to repeat it.
    """

    runs: Path
    output: Path
    settings: tuple[str, ...]
    cells: tuple[str, ...]
    jobs: int
    threads: int
    device: torch.device
    command: str

    def folder(self, sweep: str) -> Path:
        """Of its runs."""
        return self.runs / sweep


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument(
        "--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), metavar="NAME", help="which (default: all)"
    )
    parser.add_argument("--jobs", type=positive, default=2, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--runs", type=Path, help="folder of the sweeps (default: runs, with --quick beside output)")
    parser.add_argument("--finished", action="store_true", help="start nothing: sum up the runs that have finished")


def run(options: argparse.Namespace) -> int:
    """Runs the cells that are missing, sweep by sweep, fits each sweep, and sums up."""
    sweeps = _sweeps(options)
    if not options.finished:
        prepare(compose([f"experiment={OURS}", *sweeps.settings]).prepared)
    for name in options.sweeps:
        words = [f"+sweep={name}", f"output={sweeps.folder(name)}", *sweeps.cells, *sweeps.settings]
        code = ExitCode.FINISHED if options.finished else launch(["--multirun", "--jobs", str(sweeps.jobs), *words])
        if code != ExitCode.FINISHED:
            return code
    studies = {name: fit_sweep(name, sweeps) for name in options.sweeps}
    write_summary(studies, sweeps)
    return ExitCode.FINISHED


def _sweeps(options: argparse.Namespace) -> Sweeps:
    runs = options.runs or (options.output / f"{NAME}_runs" if options.quick else Path("runs"))
    threads = options.threads or 1
    settings = [f"trainer.threads={threads}"]
    if options.device.type == "cpu" and torch.cuda.is_available():
        # a run takes a GPU where there is one
        settings.append("trainer.device=cpu")
    if options.quick:
        settings += [*_TINY, f"data.path={options.output / f'{NAME}_data'}"]
    return Sweeps(
        runs=runs,
        output=options.output,
        settings=tuple(settings),
        cells=_TINY_CELLS if options.quick else (),
        jobs=options.jobs,
        threads=threads,
        device=options.device,
        command=options.command,
    )


def fit_sweep(name: str, sweeps: Sweeps) -> Study:
    """Fits a sweep in every metric and writes the fits.

    Returns:
        The fit of the loss.
    """
    target = sweeps.output / FITS / name
    studies = [fit(sweeps.folder(name), metric, target, log.info) for metric in SWEEPS[name]]
    return studies[0]


def write_summary(studies: dict[str, Study], sweeps: Sweeps) -> Results:
    """Writes the figures of the fits of the loss, as of the newest of all runs; the fits have the commit of each."""
    rows = [one for name, study in studies.items() for one in _rows(name, study)]
    ratios = [ratio for name, study in studies.items() for ratio in _ratios(name, study)]
    newest = max((point for study in studies.values() for point in study.points), key=lambda point: point.date)
    here = environment.describe(sweeps.device)
    found = Results(
        name=NAME,
        command=sweeps.command,
        date=newest.date,
        commit=newest.commit.replace("-dirty", "+changes"),
        device=here.device,
        threads=sweeps.threads,
        versions=here.versions,
        rows=tuple(rows),
        ratios=tuple(ratios),
    )
    write(found, sweeps.output)
    return found


def _rows(sweep: str, study: Study) -> Iterator[Row]:
    yield row(sweep, "all runs", "training", _hours(study), "h")
    for family in study.families:
        if family.fit is not None:
            yield from _law_rows(sweep, family.name, family.fit)
        if family.held_out is not None:
            for name in ("compute", "measured", "predicted", "error"):
                yield row(f"{sweep}, held out", family.name, name, float(getattr(family.held_out, name)))
        for optimum in (optimum for optimum in family.optima if optimum.inside):
            case = f"{sweep}, {optimum.compute:.2g} FLOPs"
            for name in ("parameters", "tokens", "loss"):
                yield row(case, family.name, name, float(getattr(optimum, name)))
        if family.growth is not None:
            yield row(f"{sweep}, growth of the optimum", family.name, "parameters", family.growth.parameters)
            yield row(f"{sweep}, growth of the optimum", family.name, "tokens", family.growth.tokens)


def _hours(study: Study) -> float:
    """Of training, all runs one after the other."""
    return sum(point.seconds for point in study.points) / 3600


def _law_rows(sweep: str, name: str, fitted: Fit) -> Iterator[Row]:
    """Parameters of a law, with quartiles over the resampled ones."""
    yield row(sweep, name, "R²", fitted.r_squared)
    for parameter in fitted.law.parameters:
        value, n = fitted.law.parameters[parameter], len(fitted.resampled)
        low, high = fitted.parameter_interval(parameter, 0.5)
        # a skewed distribution may leave the best fit outside
        low, high = min(low, value), max(high, value)
        yield Row(case=sweep, contender=name, metric=parameter, value=value, unit="1", n=n, q25=low, q75=high)


def _ratios(sweep: str, study: Study) -> Iterator[Ratio]:
    """Above 1 it is as it should be."""
    if sweep == SCALING:
        limit = f"limit of {_CORES * _HOURS} h of a core"
        value = _CORES * _HOURS / _hours(study)
        yield Ratio(case=sweep, metric="training", a=limit, b="all runs", value=value, target=1.0)
    families = {family.name: family for family in study.families}
    for name, family in families.items():
        if family.held_out is not None:
            limit, error = f"limit of {_ERROR:.0%}", max(abs(family.held_out.error), 1e-6)
            yield Ratio(case=sweep, metric="held-out error", a=limit, b=name, value=_ERROR / error, target=1.0)
        if family.fit is not None:
            value = family.fit.r_squared / _R_SQUARED
            yield Ratio(case=sweep, metric="R²", a=name, b=f"{_R_SQUARED}", value=value, target=1.0)
    fits = [families[name].fit if name in families else None for name in (OURS, BASELINE)]
    if fits[0] is not None and fits[1] is not None:
        runs = [[point.compute for point in families[name].fitted] for name in (OURS, BASELINE)]
        yield from _gaps(sweep, fits[0], fits[1], (max(map(min, runs)), min(map(max, runs))))


def _gaps(sweep: str, ours: Fit, baseline: Fit, compute: tuple[float, float]) -> Iterator[Ratio]:
    """The baseline's law over ours at each power of ten that both were fitted to, and the same of their intervals."""
    first, last = math.ceil(math.log10(compute[0])), math.floor(math.log10(compute[1]))
    for exponent in range(first, last + 1):
        at = np.array([10.0**exponent])
        laws = baseline.law.at(at), ours.law.at(at)
        # the least that the baseline may have over the most that we may have
        edges = baseline.interval(at)[0], ours.interval(at)[1]
        for metric, (theirs, own) in {"loss": laws, "loss at the nearer ends of 90% intervals": edges}.items():
            case, value = f"{sweep}, 1e{exponent} FLOPs", float(theirs[0] / own[0])
            yield Ratio(case=case, metric=metric, a=BASELINE, b=OURS, value=value, target=1.0)
