"""Real launches on the tiny data set: started, watched and stopped from outside, as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from tests.tiny import result_of, tiny_overrides

REPOSITORY = Path(__file__).parents[2]
_SECONDS = 120
# six epochs of eight steps, a checkpoint at every fifth step and at the end of each epoch
_RUN = ("trainer.epochs=6", "trainer.checkpoint.every_steps=5", "trainer.logging.every_steps=1")


@dataclass(frozen=True)
class Ended:
    """How a process ended and what it wrote."""

    code: int
    out: str
    err: str


class Started:
    """A Python process; it and all below it are gone when the `with` block is left."""

    def __init__(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # files, so that the process never waits for us to read
        self._files = (folder / "stdout", folder / "stderr")
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=REPOSITORY,
                stdout=out,
                stderr=err,
                env={**os.environ, **(environment or {})},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            for process in (*psutil.Process(self.process.pid).children(recursive=True), self.process):
                process.kill()
            self.process.wait()

    def ranks(self) -> list[psutil.Process]:
        """Its rank processes, rank 0 first."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return sorted((p for p in below if "RANK" in p.environ()), key=lambda p: int(p.environ()["RANK"]))

    def wait(self) -> Ended:
        code = self.process.wait(_SECONDS)
        return Ended(code, *(file.read_text() for file in self._files))


@dataclass(frozen=True)
class TinyRun:
    """A run on the tiny data set in a folder of its own."""

    data: Path
    output: Path

    @property
    def folder(self) -> Path:
        return self.output / "tiny"

    @property
    def overrides(self) -> list[str]:
        return [*tiny_overrides(self.data, self.output), *_RUN]

    def launch(self, *more: str) -> Started:
        return Started(["-m", "launch", *self.overrides, *more], self.output / "printed")

    def wait_for_step(self, step: int, launch: Started) -> None:
        deadline = time.monotonic() + _SECONDS
        while self.step() < step:
            assert launch.process.poll() is None and time.monotonic() < deadline, f"step {self.step()}"
            time.sleep(0.01)

    def step(self) -> int:
        log = self.folder / "metrics.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        # the last line may be half written
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def checkpoints(self) -> list[int]:
        return sorted(int(p.name.removeprefix("step-")) for p in (self.folder / "checkpoints").glob("step-*[0-9]"))

    def result(self) -> dict[str, Any]:
        return result_of(self.folder)
