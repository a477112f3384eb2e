"""A profile of a few steps of rank 0: a trace, and what they allocated."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from hstu_dist.files import write_atomically
from hstu_dist.train.config import ProfileConfig
from hstu_dist.train.step import StepResult
from hstu_dist.train.trainer import Hook, Trainer

logger = logging.getLogger(__name__)


class ProfileHook(Hook):
    """Traces a few steps of rank 0 into `trace.json`, for Chrome's or Perfetto's viewer; with their memory if asked."""

    def __init__(self, config: ProfileConfig, run_dir: Path) -> None:
        self.config = config
        self.run_dir = run_dir
        self._steps = 0
        self._profile: profile | None = None
        self._on_gpu = False

    def on_start(self, trainer: Trainer) -> None:
        """Starts at once if the first step is to be traced."""
        self._maybe_start(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Starts before the configured step, stops after the configured number."""
        self._steps += 1
        first = self.config.first_step
        if self._profile is not None and first is not None and self._steps >= first + self.config.num_steps:
            self._finish()
        self._maybe_start(trainer)

    def on_stop(self, trainer: Trainer) -> None:
        """Writes a trace that the end of the run cut short."""
        self._finish()

    def _maybe_start(self, trainer: Trainer) -> None:
        if not trainer.world.is_main or self.config.first_step != self._steps:
            return
        self._on_gpu = trainer.world.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        if self.config.memory and self._on_gpu:
            torch.cuda.memory._record_memory_history()
        self._profile = profile(activities=activities, profile_memory=self.config.memory)
        self._profile.start()

    def _finish(self) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        trace = self.run_dir / "trace.json"
        self._profile.export_chrome_trace(str(trace))
        logger.info("trace of %d steps written to %s", self.config.num_steps, trace)
        if self.config.memory:
            self._write_memory(self._profile)
        self._profile = None

    def _write_memory(self, profiled: profile) -> None:
        """Bytes that each operator allocated and did not free itself, most first; a GPU's snapshot beside it."""
        operators = [
            {"operator": event.key, "calls": event.count, "bytes": self._bytes(event)}
            for event in profiled.key_averages()
            if self._bytes(event)
        ]
        operators.sort(key=lambda operator: -operator["bytes"])
        write_atomically(self.run_dir / "memory.json", json.dumps(operators, indent=1).encode())
        if self._on_gpu:
            snapshot = self.run_dir / "memory_snapshot.pickle"
            torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
            logger.info("memory snapshot written to %s", snapshot)

    def _bytes(self, event: object) -> int:
        memory: int = getattr(event, "self_device_memory_usage" if self._on_gpu else "self_cpu_memory_usage")
        return memory
