"""Which sequences every step was trained on, as each rank wrote it down: proof that none was missed or repeated."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hstu_dist.batch import JaggedBatch
from hstu_dist.distributed.process_group import World
from hstu_dist.files import LineFile, write_atomically
from hstu_dist.models.flops import Workload
from hstu_dist.train.step import StepResult

Step = Callable[[JaggedBatch, Workload, tuple[int, int | None]], StepResult]


class SequenceLog:
    """A training step that writes down its sequences once it was taken.

    A resumed run drops what was logged after its checkpoint, as the metrics do: what stays is what the weights have
    seen.
    """

    def __init__(self, step: Step, folder: Path, world: World, resume_step: int) -> None:
        """Wraps `step`; all ranks make one before the first step."""
        self._step = step
        self._path = folder / f"rank-{world.rank}.jsonl"
        self._file: LineFile | None = None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            # also of ranks that this attempt has not; the others write after the first step, which needs rank 0
            for path in folder.glob("rank-*.jsonl"):
                kept = [line for line in _lines(path) if line["step"] < resume_step]
                write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def __call__(self, batch: JaggedBatch, work: Workload, position: tuple[int, int | None]) -> StepResult:
        """The step."""
        result = self._step(batch, work, position)
        if self._file is None:
            self._file = LineFile(self._path)
        line = {"step": position[0], "refused": result.refusal is not None, "sequences": batch.row_ids.tolist()}
        self._file.add(json.dumps(line))
        return result

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def read_sequences(folder: Path) -> dict[int, Counter[int]]:
    """How often the ranks together trained on each sequence, step by step; refused steps are left out."""
    steps: dict[int, Counter[int]] = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        for line in _lines(path):
            if not line["refused"]:
                steps.setdefault(line["step"], Counter()).update(line["sequences"])
    return steps


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text().splitlines():
        # a killed process can leave half a line at the end
        with contextlib.suppress(ValueError):
            yield json.loads(text)
