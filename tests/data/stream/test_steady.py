"""Ten minutes of a stream at full speed: a million events a second, and memory that does not grow."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from benchmarks.stream import Load, follow

MINUTES = 10
EVENTS = 4_000_000


@pytest.mark.long
@pytest.mark.timeout(MINUTES * 60 + 300)
def test_ten_minutes_at_a_million_events_a_second_in_constant_memory(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    load = Load(windows=10**6, events=EVENTS)
    writer = multiprocessing.get_context("spawn").Process(target=load.write, args=(files, 40), daemon=True)
    writer.start()
    seconds, memory = [], []
    end = time.monotonic() + MINUTES * 60
    try:
        for window, (took, resident, _) in enumerate(follow(files, tmp_path / "run")):
            seconds.append(took)
            memory.append(resident)
            # what is trained on makes room for the writer; the windows in hand keep their files
            for number in range(4 * (window - 4), 4 * (window - 3)):
                (files / f"part-{number:06d}.parquet").unlink(missing_ok=True)
            if time.monotonic() > end:
                break
    finally:
        writer.kill()
        writer.join()
    tenth = len(memory) // 10
    assert EVENTS * (len(seconds) - 1) / sum(seconds[1:]) >= 1e6
    assert max(memory[-tenth:]) <= 1.1 * max(memory[tenth : 2 * tenth])
