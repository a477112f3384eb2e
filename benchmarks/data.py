"""Feeding the model: events/s of reading and batching, cost and sparsity of Stochastic Length, balance of 64 ranks."""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from benchmarks.cells import Findings
from benchmarks.harness import GEMM, Effort, Samples, Step, Timings, clock_of, compare, gemm
from benchmarks.parts import run_parts
from hstu_dist.commands.session import sequence_cost
from hstu_dist.data.balance import by_cost, by_cost_and_count, imbalance, in_turns, largest_item_bound
from hstu_dist.data.config import LoaderConfig, StochasticLengthConfig, SyntheticZipfConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.flat_columns import FLAT_FOLDER
from hstu_dist.data.loader import BatchLoader
from hstu_dist.data.prepare import prepare
from hstu_dist.data.split import Split
from hstu_dist.data.stochastic_length import StochasticLength
from hstu_dist.data.synthetic import power_law
from hstu_dist.machine import gpu_peak_flops
from hstu_dist.models.config import HSTUConfig
from hstu_dist.models.flops import Workload, count_flops
from hstu_dist.report.results import Ratio, Row

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

FEED = "Zipf 1.2 histories up to 4,096, batches of 128, one process"
READ, WHOLE = "check Parquet and copy it into columns", "whole histories"
LAWS = {f"cut, {name}": StochasticLengthConfig(selection=name) for name in ("greedy", "random", "weighted")}
_EVENTS_PER_SECOND = 8e6
"""What one process has to deliver."""

PUBLISHED_SPARSITY = {1024: 71.5, 2048: 76.1, 4096: 80.5, 8192: 84.4}
"""Percent at alpha 1.6 by longest history, arXiv 2402.17152."""
_MEDIAN, _SIGMA = 3443.0, 1.8
"""Log-normal histories before they are cut, fitted to the published sparsities: the paper names no law."""
_SPARSITY_POINTS = 3.0

RANKS = 64
MODEL = HSTUConfig(width=512, num_heads=8, num_layers=8, max_length=4096)
_SCORES = 129
BALANCES: Mapping[str, Callable[[Floats, int], npt.NDArray[np.int64]]] = {
    "in turns": in_turns,
    "cost": by_cost,
    "cost and count": by_cost_and_count,
}
_IMBALANCE = 0.03
_SHARE_OF_STEP = 0.02


def run(options: argparse.Namespace) -> int:
    """Measures everything on one process and writes the result file."""
    # a reader's own pool would use all cores whatever the option says
    pa.set_cpu_count(torch.get_num_threads())
    parts = {
        "feeding": partial(_feeding, options.quick),
        "sparsity": partial(_sparsity, options.quick),
        "balancing": partial(_balancing, options.quick),
    }
    return run_parts("data", parts, options, torch.device("cpu"))


def _feeding(quick: bool) -> Findings:
    with tempfile.TemporaryDirectory() as folder:
        config = SyntheticZipfConfig(path=f"{folder}/zipf", num_users=300 if quick else 10_000)
        events = prepare(config).num_events
        log.info("%s: %d events", FEED, events)
        dataset = SequenceDataset.open(config.path)
        steps: dict[str, Step] = {READ: partial(_open_anew, config.path), WHOLE: _epochs(dataset, None)}
        steps |= {name: _epochs(dataset, law) for name, law in LAWS.items()}
        timings = compare(steps, _effort(quick), clock_of(torch.device("cpu")))
    return Findings(feed_rows(timings, events), feed_ratios(timings, events))


def _open_anew(path: str) -> None:
    """As the first time, when there are no columns yet."""
    shutil.rmtree(Path(path) / FLAT_FOLDER, ignore_errors=True)
    SequenceDataset.open(path)


def _epochs(dataset: SequenceDataset, law: StochasticLengthConfig | None) -> Step:
    """A step that makes all batches of an epoch, a new one each time."""
    config = LoaderConfig(split=Split.TRAIN, global_batch_size=128, max_length=4096, stochastic_length=law)
    loader, epochs = BatchLoader(dataset, config), count()

    def one() -> None:
        for batch in loader.epoch(next(epochs)):
            assert batch.num_tokens

    return one


def feed_rows(timings: Timings, events: int) -> list[Row]:
    """Rates, and what cutting costs beside whole histories."""
    rows = []
    for name, seconds in timings.seconds.items():
        rows.append(seconds.map(lambda s: events / s / 1e6).row(FEED, name, "events", "million/s"))
    for name in LAWS:
        pairs = zip(timings.seconds[name].values, timings.seconds[WHOLE].values, strict=True)
        added = Samples(tuple((cut - whole) / events * 1e9 for cut, whole in pairs))
        rows.append(added.row(FEED, name, "added to whole histories, a million events", "ms"))
    return rows


def feed_ratios(timings: Timings, events: int) -> list[Ratio]:
    """Rates against the target; the first epoch of a process reads, too."""
    seconds = {name: samples.median for name, samples in timings.seconds.items()}
    target = f"{_EVENTS_PER_SECOND / 1e6:g} million/s"
    delivered = {name: seconds[name] for name in (WHOLE, *LAWS)}
    for name in (WHOLE, *LAWS):
        delivered[f"first epoch: {READ}, {name}"] = seconds[READ] + seconds[name]
    return [
        Ratio(case=FEED, metric="events/s", a=name, b=target, value=events / s / _EVENTS_PER_SECOND, target=1.0)
        for name, s in delivered.items()
    ]


def _sparsity(quick: bool) -> Findings:
    sequences = 2_000 if quick else 50_000
    uniform = (np.arange(sequences) + 0.5) / sequences
    histories = _MEDIAN * np.exp(_SIGMA * np.array([NormalDist().inv_cdf(u) for u in uniform]))
    found = Findings()
    for longest, published in PUBLISHED_SPARSITY.items():
        case = f"Stochastic Length 1.6, log-normal histories up to {longest:,}"
        law = StochasticLength(StochasticLengthConfig(), longest, seed=0)
        lengths = np.clip(histories, 1, longest).astype(np.int64)
        epochs = [law.kept_lengths(np.arange(sequences), lengths, epoch).mean() / longest for epoch in range(5)]
        ours = Samples(tuple(100 * (1 - float(kept)) for kept in epochs))
        found.rows.append(ours.row(case, "hstu_dist", "sparsity", "%"))
        found.rows.append(Samples((published,)).row(case, "paper", "sparsity", "%"))
        # a difference of nothing would give an infinite ratio
        difference = max(abs(ours.median - published), 0.1)
        found.ratios.append(
            Ratio(
                case=case,
                metric="sparsity",
                a=f"{_SPARSITY_POINTS:g} points",
                b="difference from the paper",
                value=_SPARSITY_POINTS / difference,
                target=1.0,
            )
        )
    return found


def _balancing(quick: bool) -> Findings:
    findings = Findings()
    for sequences in (32, 128):
        case = f"{RANKS} ranks x {sequences} sequences, Zipf 1.2 lengths up to 4,096, HSTU of 8 layers, width 512"
        draws = list(batch_costs(sequences, draws=3 if quick else 20))
        found = {
            name: Samples(tuple(imbalance(costs, share(costs, RANKS), RANKS) for costs in draws))
            for name, share in BALANCES.items()
        }
        found["largest sequence"] = Samples(tuple(largest_item_bound(costs, RANKS) for costs in draws))
        findings.rows += [samples.row(case, name, "imbalance", "1") for name, samples in found.items()]
        findings.ratios += [_balance_ratio(case, name, found) for name in BALANCES if name != "in turns"]
        findings.add(_balancing_cost(case, draws, quick))
    return findings


def batch_costs(sequences: int, draws: int) -> Iterator[Floats]:
    """FLOPs of every sequence of a global batch."""
    law = sequence_cost(lambda length: _training_flops(Workload.causal([length])), MODEL.max_length)
    for seed in range(draws):
        uniform = np.random.default_rng(seed).random(RANKS * sequences)
        yield law.of(power_law(uniform, 1.2, (1, 4096)))


def _training_flops(work: Workload) -> int:
    return count_flops(MODEL, work, _SCORES).training


def _balance_ratio(case: str, name: str, found: Mapping[str, Samples]) -> Ratio:
    """The busiest rank's work that is allowed, over what it is, in the worst draw."""
    pairs = zip(found[name].values, found["largest sequence"].values, strict=True)
    return Ratio(
        case=case,
        metric="work of the busiest rank",
        a=f"mean + {_IMBALANCE:.0%} or the largest sequence",
        b=name,
        value=min((1 + max(_IMBALANCE, bound)) / (1 + got) for got, bound in pairs),
        target=1.0,
    )


def _balancing_cost(case: str, draws: list[Floats], quick: bool) -> Findings:
    """Seconds of balancing beside the shortest step of a rank's share: on this machine, and by a GPU's data sheet."""
    device = torch.device("cpu")
    yardstick = gemm(device, torch.float32, 256 if quick else 2048)
    turn = count()
    steps: dict[str, Step] = {GEMM: yardstick.step}
    for name in ("cost", "cost and count"):
        share = BALANCES[name]
        steps[name] = lambda share=share: share(draws[next(turn) % len(draws)], RANKS)  # type: ignore[misc]
    timings = compare(steps, _effort(quick), clock_of(device))
    work = sum(float(costs.sum()) for costs in draws) / len(draws) / RANKS
    peak = gpu_peak_flops("H100", "bfloat16")
    assert peak is not None
    # nobody measured the second: it is the fastest that the chip could ever be, and not held against a target
    shortest = {
        "a step at this machine's GEMM rate": (work / yardstick.flops * timings.seconds[GEMM].median, 1.0),
        "a step at an H100's bf16 data sheet rate": (work / peak, None),
    }
    rows = [Samples((seconds,)).row(case, step, "time", "s") for step, (seconds, _) in shortest.items()]
    ratios = []
    for name in ("cost", "cost and count"):
        rows.append(timings.seconds[name].row(case, name, "time", "s"))
        for step, (seconds, target) in shortest.items():
            ratio = _SHARE_OF_STEP * seconds / timings.seconds[name].median
            limit = f"{_SHARE_OF_STEP:.0%} of {step}"
            ratios.append(Ratio(case=case, metric="balancing time", a=limit, b=name, value=ratio, target=target))
    return Findings(rows, ratios)


def _effort(quick: bool) -> Effort:
    return Effort(budget_seconds=1, min_rounds=2, max_rounds=3, warm_up_seconds=0) if quick else Effort()
