"""One rank of the checkpoint benchmark: saves and loads a table beside plain files of the same size, in turns.

torchrun ... -m benchmarks.checkpoint_worker REQUEST.json ANSWER.json
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hstu_dist.checkpoint.manager import CheckpointManager
from hstu_dist.distributed.config import ITEM, EmbeddingConfig, TableOptimizerConfig, TableShape
from hstu_dist.distributed.planner import build_tables
from hstu_dist.distributed.process_group import World, claim_machine, process_group
from hstu_dist.distributed.tables import EmbeddingTables

_BLOCK = 1 << 22


@dataclass(frozen=True)
class Request:
    """What to measure: a table of `rows` x `width` with AdamW's state, `rounds` times, in `folder`."""

    folder: str
    rows: int
    width: int
    rounds: int


@dataclass(frozen=True)
class Answer:
    """Bytes of all ranks, and seconds of each round by what was done; the slowest rank counts."""

    bytes: int
    seconds: dict[str, list[float]]


def measure(request: Request) -> Answer | None:
    """Runs the rounds; all ranks call it together, and rank 0 gets the answer."""
    with process_group("cpu", 600.0) as world:
        claim_machine(None, world)
        config = EmbeddingConfig(sharding="row_wise", optimizer=TableOptimizerConfig(kind="adamw"))
        tables = build_tables(config, {ITEM: TableShape(request.rows, request.width)}, world.device, seed=0)
        bench = _Bench(Path(request.folder), tables, world)
        bench.round()
        rounds = [bench.round() for _ in range(request.rounds)]
        seconds = {name: [found[name] for found in rounds] for name in rounds[0]}
        return Answer(bytes=bench.bytes * world.size, seconds=seconds) if world.is_main else None


class _Bench:
    def __init__(self, folder: Path, tables: EmbeddingTables, world: World) -> None:
        self.tensors: dict[str, Any] = {**tables.weights(), **tables.optimizer.state_tensors()}
        shards = [s.tensor for v in self.tensors.values() if hasattr(v, "local_shards") for s in v.local_shards()]
        for shard in shards:
            # zeros could be stored or moved faster
            shard.normal_()
        self.bytes = sum(shard.nbytes for shard in shards)
        self.block = os.urandom(_BLOCK)
        self.plain = folder / f"plain-{world.rank}"
        self.managers = {
            name: CheckpointManager(folder / name, keep=1, asynchronous=name == "asynchronous")
            for name in ("synchronous", "asynchronous")
        }
        self.step = 0

    def round(self) -> dict[str, float]:
        """Seconds of everything, once; who writes first changes from round to round.

        A disk is slower right after a gigabyte than after a rest.
        """
        seconds: dict[str, float] = {}
        writers = [self._plain_round, self._synchronous_round, self._asynchronous_round]
        first = self.step % len(writers)
        self.step += 1
        for writer in (*writers[first:], *writers[:first]):
            seconds |= writer()
        _forget([self.plain])
        seconds["plain read"] = _timed(self._read_plain)
        _forget(sorted(self.managers["synchronous"].path(self.step).iterdir()))
        seconds["load"] = _timed(lambda: self.managers["synchronous"].load(self.step, self.tensors))
        return seconds

    def _plain_round(self) -> dict[str, float]:
        return {"plain write": _timed(self._write_plain)}

    def _synchronous_round(self) -> dict[str, float]:
        return {"synchronous save": _timed(lambda: self._save("synchronous"))}

    def _asynchronous_round(self) -> dict[str, float]:
        began = time.perf_counter()
        stall = _timed(lambda: self._save("asynchronous"))
        self.managers["asynchronous"].finish()
        return {"stall": stall, "asynchronous save": _slowest(time.perf_counter() - began)}

    def _save(self, name: str) -> None:
        self.managers[name].save(self.tensors, {"step": self.step}, -1)

    def _write_plain(self) -> None:
        with self.plain.open("wb", buffering=0) as file:
            for start in range(0, self.bytes, _BLOCK):
                file.write(self.block[: self.bytes - start])
            os.fsync(file.fileno())

    def _read_plain(self) -> None:
        buffer = bytearray(_BLOCK)
        with self.plain.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _timed(action: Callable[[], object]) -> float:
    """Seconds of the slowest rank, all having begun together."""
    dist.barrier()
    began = time.perf_counter()
    action()
    return _slowest(time.perf_counter() - began)


def _slowest(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def _forget(paths: Sequence[Path]) -> None:
    """Asks the system to drop files from its cache, so that the next reader needs the disk."""
    dist.barrier()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    # TorchRec hands out ShardedTensor, which torch wants replaced by DTensor
    warnings.filterwarnings("ignore", message="Please use DTensor", category=FutureWarning)
    asked, answered = (Path(argument) for argument in sys.argv[1:])
    answer = measure(Request(**json.loads(asked.read_text())))
    if answer is not None:
        answered.write_text(json.dumps(asdict(answer)))
