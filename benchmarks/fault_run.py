"""One run of the fault campaign: launched as a user would, watched and hurt from outside, checked when it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from benchmarks.environment import ROOT
from hstu_dist.data.config import SyntheticZipfConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.prepare import prepare
from hstu_dist.data.split import Split, split_rows
from hstu_dist.run_folder import RunFolder
from hstu_dist.train.metrics_file import read_metrics
from hstu_dist.train.sequence_log import read_sequences

NAME = "faulty"
EPOCHS = 5
USERS = 384
BATCH = 32
MAX_LENGTH = 16
_POLL_SECONDS = 0.02
_DEADLINE_SECONDS = 150.0
_DATA: dict[str, Any] = {
    "max_length": MAX_LENGTH,
    "num_users": USERS,
    "num_items": 60,
    "item_exponent": 0.5,
    "min_events": 6,
    "max_events": 20,
}
RUN = (
    f"name={NAME}",
    "data=synthetic_zipf",
    *(f"data.{name}={value}" for name, value in _DATA.items()),
    "model.width=8",
    "loss.num_negatives=8",
    f"trainer.epochs={EPOCHS}",
    f"trainer.global_batch_size={BATCH}",
    "trainer.device=cpu",
    "trainer.threads=1",
    "trainer.peak_flops=1e9",
    "trainer.evaluation.cutoffs=[1,10]",
    "trainer.checkpoint.every_steps=5",
    "trainer.logging.every_steps=1",
    "trainer.logging.progress=false",
    "trainer.logging.tensorboard=false",
    "trainer.logging.sequences=true",
)


class FaultyRunError(Exception):
    """The run did not do what it was watched for in time."""


@dataclass
class Seen:
    """What the log of steps showed.

    Attributes:
        last_step: the newest.
        lost_steps: that were taken and then taken again.
        recovered_at: clock of the first step that was taken after the fault by ranks that had recovered from it.
        restarts: how often the run went on from a checkpoint.
        stops: whether the fault makes it do so.
    """

    last_step: int = 0
    lost_steps: int = 0
    recovered_at: float | None = None
    restarts: int = 0
    stops: bool = True
    _inode: int = -1
    _resumed: int = 0

    def look(self, log: Path, since: float | None) -> None:
        """Reads the log once; `since` is when the fault began, None before."""
        with contextlib.suppress(FileNotFoundError):
            inode, text = log.stat().st_ino, log.read_text()
            steps = [json.loads(line)["step"] for line in text.splitlines() if line.endswith("}")]
            step = max(steps, default=0)
            if self._inode not in (-1, inode):
                # a resumed run replaces the log by what its checkpoint has seen
                self.restarts += 1
                self.lost_steps += max(0, self.last_step - step)
                self._resumed = step
            goes_on = step > max(self.last_step, self._resumed) and (self.restarts > 0 or not self.stops)
            if goes_on and since is not None and self.recovered_at is None:
                self.recovered_at = time.monotonic()
            self._inode, self.last_step = inode, step


@dataclass
class FaultyRun:
    """A run in a folder of its own.

    Attributes:
        data: prepared data set.
        folder: of everything that it writes.
        settings: overrides on top of the campaign's.
        variables: environment on top of this process's.
    """

    data: Path
    folder: Path
    settings: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen, init=False)
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    since: float | None = field(default=None, init=False)

    @property
    def run_folder(self) -> RunFolder:
        """Of the run itself."""
        return RunFolder(self.folder / NAME)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.launch()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def launch(self) -> None:
        """Starts it, or lets it go on."""
        words = [*RUN, f"data.path={self.data}", f"output={self.folder}", *self.settings]
        with (self.folder / "printed").open("ab") as printed:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launch", *words],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
            )

    def processes(self) -> list[psutil.Process]:
        """Everything below the launch."""
        try:
            return [] if self.process is None else psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def with_words(self, *words: str) -> list[psutil.Process]:
        """Processes below the launch with all of these words in their command."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                # a shell or `ip netns exec` in front of it has the words, too
                if Path(command[0]).name.startswith("python") and all(word in command for word in words):
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Rank processes in the order of their rank."""
        ranks = {}
        for process in self.with_words("hstu_dist", "train"):
            with contextlib.suppress(psutil.Error):
                if "RANK" in process.environ():
                    ranks[int(process.environ()["RANK"])] = process
        return [ranks[rank] for rank in sorted(ranks)]

    def agents(self) -> list[psutil.Process]:
        """Agents, first machine first."""
        return sorted(self.with_words("hstu_dist.distributed.agent"), key=lambda p: _node_of(p.cmdline()))

    def watch(self, until: Any, what: str) -> None:
        """Polls until something holds.

        Raises:
            FaultyRunError: it does not, or the launch has ended before.
        """
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while not until():
            self.seen.look(self.run_folder.path / "metrics.jsonl", self.since)
            if time.monotonic() > deadline:
                raise FaultyRunError(f"{what}: not within {_DEADLINE_SECONDS:g} s, at step {self.seen.last_step}")
            time.sleep(_POLL_SECONDS)

    def reach(self, step: int) -> None:
        """Waits for a step."""
        self.watch(lambda: self.seen.last_step >= step or self._ended(), f"step {step}")
        if self.seen.last_step < step:
            raise FaultyRunError(f"step {step}: the launch has ended with {self.code()}")

    def hurt(self) -> None:
        """Marks the time of the fault."""
        self.since = time.monotonic()

    def end(self) -> int:
        """Waits for the launch; returns its exit code."""
        self.watch(self._ended, "end")
        self.seen.look(self.run_folder.path / "metrics.jsonl", self.since)
        return self.code()

    def code(self) -> int:
        """Exit code of the launch."""
        assert self.process is not None
        return self.process.wait()

    def kill_all(self) -> None:
        """Everything at once, as when the power fails."""
        below = self.processes()
        assert self.process is not None
        self.process.kill()
        for process in below:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        self.process.wait()

    def metrics(self) -> dict[str, float]:
        """Test metrics, and those of the validation after every epoch.

        Raises:
            FaultyRunError: the run has no result.
        """
        result = self.run_folder.result()
        if result is None:
            raise FaultyRunError(f"no result, see {self.folder / 'printed'}")
        found = {f"test/{name}": float(value) for name, value in result["test"].items()}
        for line in read_metrics(self.run_folder.path):
            for name, value in line.items():
                if name.startswith("validation/") and name != "validation/seconds":
                    found[f"{name} at {line['step']}"] = value
        return found

    def _ended(self) -> bool:
        return self.process is None or self.process.poll() is not None


def _node_of(command: Sequence[str]) -> int:
    """Number of an agent's machine, from its folder of logs."""
    logs = next((Path(word).name for word in command if word.startswith("--log-dir=")), "node0")
    return int(logs.removeprefix("node")) if logs.startswith("node") else 0


def trained_once(run: FaultyRun, left_out: Sequence[int] = ()) -> str:
    """What is wrong with the sequences of a finished run; empty if every one was trained on once in each epoch.

    Args:
        run: finished, with its log of sequences.
        left_out: steps that were rightly refused.
    """
    dataset = SequenceDataset.open(str(run.data))
    expected = Counter(split_rows(dataset.lengths, Split.TRAIN, MAX_LENGTH).sequences.tolist())
    per_epoch = -(-len(expected) // BATCH)
    steps = read_sequences(run.run_folder.sequences)
    missing = sorted(set(range(EPOCHS * per_epoch)) - set(steps))
    if missing != sorted(left_out) or max(steps) >= EPOCHS * per_epoch:
        return f"steps {missing} are missing"
    for epoch in range(EPOCHS):
        numbers = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen: Counter[int] = sum((steps[step] for step in numbers if step in steps), Counter())
        wrong = seen - expected
        skipped = sum((expected - seen).values())
        if wrong or skipped != BATCH * sum(step in numbers for step in left_out):
            return f"epoch {epoch}: {len(wrong)} sequences too often, {skipped} not at all"
    return ""


def prepared_data(folder: Path) -> Path:
    """A small data set in `folder`, prepared once."""
    path = folder / "data"
    prepare(SyntheticZipfConfig(path=str(path), **_DATA))
    return path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
