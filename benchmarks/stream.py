"""Following a stream: events/s in steady state with the memory they take, and MovieLens-1M predicted week by week."""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.environment import describe
from benchmarks.harness import Samples
from benchmarks.play_stream import play
from hstu_dist.commands.stream import mean_over, windows_of
from hstu_dist.config import compose
from hstu_dist.data.config import LoaderConfig
from hstu_dist.data.split import Split
from hstu_dist.data.stream.archive import Archive
from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.data.stream.follower import Follower, Progress
from hstu_dist.data.stream.loader import WindowLoader
from hstu_dist.data.stream.pipeline import Pipeline
from hstu_dist.data.stream.quarantine import Quarantine
from hstu_dist.data.stream.source import Source
from hstu_dist.data.synthetic import power_law
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.report.results import Ratio, Results, Row, write
from hstu_dist.run_folder import RunFolder
from launch.__main__ import main as launch

log = logging.getLogger(__name__)

_USERS, _ITEMS, _MAX_LENGTH = 200_000, 100_000, 200
_EVENTS_PER_SECOND = 1e6
"""What one process has to take in."""
_GROWTH = 1.1
"""Memory of the last tenth of the windows over that of the second tenth that passes for constant."""
_MONITORED = ("hr@10", "ndcg@10", "hr@50", "mrr")
_DEMO = "MovieLens-1M by weeks"


@dataclass(frozen=True, kw_only=True)
class Load:
    """A synthetic stream: Zipf users (exponent 1) and items (1.2), in files of a quarter of a window.

    Attributes:
        windows: how many.
        events: of a window.
    """

    windows: int
    events: int

    def write(self, folder: Path, most: int | None = None) -> None:
        """All files, and the end; with `most`, waits while so many are there."""
        random = np.random.default_rng(0)
        quarter = self.events // 4
        for number in range(4 * self.windows):
            while most is not None and sum(1 for _ in folder.glob("part-*")) >= most:
                time.sleep(0.05)
            begin = 1_700_000_040 + 15 * number
            users = power_law(random.random(quarter), 1.0, (1, _USERS))
            items = power_law(random.random(quarter), 1.2, (1, _ITEMS)) - 1
            seconds = begin + np.arange(quarter) * 15 // quarter
            table = pa.table({"user_id": users, "item_id": items, "timestamp": seconds})
            pq.write_table(table, folder / "_unfinished", compression="lz4")
            (folder / "_unfinished").rename(folder / f"part-{number:06d}.parquet")
        (folder / "_SUCCESS").touch()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--windows", type=int, default=40, help="of the synthetic stream, 4 million events each")
    parser.add_argument("--nproc", type=int, default=2, help="ranks that train on MovieLens-1M")
    parser.add_argument("--prepared", type=Path, default=Path("data/ml1m"), help="MovieLens-1M, prepared")


def run(options: argparse.Namespace) -> int:
    """Measures both and writes the result file."""
    load = Load(windows=4, events=40_000) if options.quick else Load(windows=options.windows, events=4_000_000)
    rows, ratios = steady(load)
    if not options.quick:
        more_rows, more_ratios = prequential(options.prepared, options.nproc, options.output)
        rows, ratios = rows + more_rows, ratios + more_ratios
    found = Results(
        name="stream",
        command=options.command,
        rows=tuple(rows),
        ratios=tuple(ratios),
        **asdict(describe(torch.device("cpu"))),
    )
    log.info("written to %s", write(found, options.output))
    return 0


def steady(load: Load) -> tuple[list[Row], list[Ratio]]:
    """Events/s from files to batches of one process, window by window, and its resident memory meanwhile."""
    case = f"{load.windows} windows of {load.events / 1e6:g} million events, {_USERS:,} Zipf users, one process"
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "files")
        files.mkdir()
        load.write(files)
        seconds, memory, tokens = zip(*follow(files, Path(folder, "run")), strict=True)
    # the first window is half empty: histories are short, and files were read before the clock ran
    steady_seconds, steady_memory = seconds[1:], memory[1:]
    rates = Samples(tuple(load.events / s / 1e6 for s in steady_seconds))
    tenth = max(1, len(steady_memory) // 10)
    early, late = max(steady_memory[tenth : 2 * tenth]), max(steady_memory[-tenth:])
    mean_rate = load.events * len(steady_seconds) / sum(steady_seconds)
    rows = [
        rates.row(case, "hstu_dist", "events", "million/s"),
        Samples(tuple(t / s / 1e6 for t, s in zip(tokens[1:], steady_seconds, strict=True))).row(
            case, "hstu_dist", "tokens with history", "million/s"
        ),
        Samples((early / 1e6,)).row(case, "hstu_dist", "memory, second tenth", "MB"),
        Samples((late / 1e6,)).row(case, "hstu_dist", "memory, last tenth", "MB"),
        Samples((sum(seconds),)).row(case, "hstu_dist", "time", "s"),
    ]
    target = f"{_EVENTS_PER_SECOND / 1e6:g} million/s"
    ratios = [
        Ratio(case=case, metric="events/s", a="hstu_dist", b=target, value=mean_rate / _EVENTS_PER_SECOND, target=1.0),
        Ratio(
            case=case,
            metric="memory",
            a=f"{_GROWTH:g} x second tenth",
            b="last tenth",
            value=_GROWTH * early / late,
            target=1.0,
        ),
    ]
    return rows, ratios


def follow(files: Path, run_folder: Path) -> Iterator[tuple[float, int, int]]:
    """Seconds, resident bytes and tokens of each window; its batches are made and dropped."""
    config = StreamConfig(
        path=str(files),
        num_items=_ITEMS,
        max_length=_MAX_LENGTH,
        window_length="minute",
        settle_seconds=0.0,
        history_mib=64.0,
    )
    archive = Archive(run_folder / "stream")
    settings = LoaderConfig(split=Split.TRAIN, global_batch_size=1024, max_length=_MAX_LENGTH)
    loader = WindowLoader(archive, settings)
    process = psutil.Process()
    window, began = 0, time.perf_counter()
    pipeline = Pipeline(config, archive, Quarantine(run_folder / "quarantine.jsonl"))
    with Follower(Source(str(files)), pipeline) as follower:
        while (progress := follower.poll(window, 60)) is not Progress.ENDED:
            if progress is not Progress.READY:
                continue
            tokens = sum(batch.num_tokens for batch in loader.epoch(window))
            archive.remove_before(window)
            now = time.perf_counter()
            yield now - began, process.memory_info().rss, tokens
            window, began = window + 1, now


def prequential(prepared: Path, nproc: int, output: Path) -> tuple[list[Row], list[Ratio]]:
    """HSTU against popularity on MovieLens-1M as a stream of weeks, as `make stream-demo` trains it.

    The run's plot is copied to the folder of result files.
    """
    with tempfile.TemporaryDirectory() as folder:
        weeks = Path(folder, "weeks")
        play(prepared, weeks)
        overrides = ["experiment=ml1m_stream", f"data.path={weeks}", f"output={folder}", f"nproc={nproc}"]
        began = time.perf_counter()
        if launch(overrides) != ExitCode.FINISHED:
            raise UserError("the run on MovieLens-1M by weeks failed", "see its messages above")
        seconds = time.perf_counter() - began
        run_folder = RunFolder(compose(overrides).run_dir)
        windows = windows_of(run_folder)
        output.mkdir(parents=True, exist_ok=True)
        for plot in run_folder.path.glob("prequential.*"):
            shutil.copy(plot, output / f"stream_{plot.name}")
    predicted = [window for window in windows if "model/targets" in window]
    means = {"hstu": mean_over(predicted, "model"), "popularity": mean_over(predicted, "popularity")}
    rows = [
        Samples((values[metric],)).row(_DEMO, name, metric, "1")
        for name, values in means.items()
        for metric in _MONITORED
    ]
    rows.append(Samples((seconds,)).row(_DEMO, "hstu", "whole run", "s"))
    ratio = means["hstu"]["hr@10"] / means["popularity"]["hr@10"]
    return rows, [Ratio(case=_DEMO, metric="hr@10", a="hstu", b="popularity", value=ratio, target=1.0)]
