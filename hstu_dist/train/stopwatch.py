"""Time of parts of a step: by the clock, or on a GPU by events in its stream, which nothing waits for meanwhile."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Adds up the time between `start` and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event | float] = []

    def start(self) -> None:
        """From here."""
        self._marks.append(self._now())

    def stop(self) -> None:
        """To here."""
        self._marks.append(self._now())

    def seconds(self) -> float:
        """All parts together; on a GPU it waits for the last one to be done."""
        total = 0.0
        for start, stop in zip(self._marks[::2], self._marks[1::2], strict=True):
            if isinstance(start, float):
                assert isinstance(stop, float)
                total += stop - start
            else:
                assert isinstance(stop, torch.cuda.Event)
                stop.synchronize()
                total += float(start.elapsed_time(stop)) / 1e3
        return total

    def _now(self) -> torch.cuda.Event | float:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
