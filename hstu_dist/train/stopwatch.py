"""Time between two points of a step: by the clock, or on a GPU by events in its stream, which nothing waits for."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Starts when it is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since = time.perf_counter()
        self._start = self._event()

    def seconds(self) -> float:
        """Until now; on a GPU until the work that was launched so far is done, which this waits for."""
        end = self._event()
        if self._start is None or end is None:
            return time.perf_counter() - self._since
        end.synchronize()
        return float(self._start.elapsed_time(end)) / 1e3

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
