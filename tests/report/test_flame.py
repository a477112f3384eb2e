"""A trace becomes a tree of a step's parts, and a picture of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile, record_function

from hstu_dist.errors import UserError
from hstu_dist.report.flame import STEP, read_trace, write_flame


def event(name: str, start: float, end: float, **other: Any) -> dict[str, Any]:
    """Times in milliseconds."""
    fields = {"ph": "X", "cat": "user_annotation", "pid": 1, "tid": 1, "ts": 1e3 * start, "dur": 1e3 * (end - start)}
    return {"name": name, **fields, **other}


def trace(folder: Path, *events: dict[str, Any]) -> Path:
    path = folder / "trace.json"
    path.write_text(json.dumps({"traceEvents": list(events)}))
    return path


def test_events_nest_and_are_averaged_over_the_steps(tmp_path: Path) -> None:
    path = trace(
        tmp_path,
        event("step", 0, 10),
        event("encode", 1, 5),
        event("aten::mm", 2, 3, cat="cpu_op"),
        event("aten::mm", 3, 5, cat="cpu_op"),
        event("autograd::engine::evaluate_function: X", 6, 8, cat="cpu_op"),
        event("step", 20, 40),
        event("encode", 20, 40),
        # another thread, between the steps, no duration, no work of a CPU
        event("other", 1, 2, tid=2),
        event("validate", 12, 18),
        event("mark", 1, 1, ph="i"),
        event("kernel", 1, 9, cat="kernel"),
    )
    root = read_trace(path)
    assert root.seconds == pytest.approx(0.015)
    assert list(root.children) == ["encode", "X"]
    assert root.children["encode"].seconds == pytest.approx(0.012)
    assert root.children["encode"].children["aten::mm"].seconds == pytest.approx(0.0015)
    assert not root.children["X"].children


def test_a_real_trace_is_drawn_the_same_every_time(tmp_path: Path) -> None:
    with profile() as profiler:
        for _ in range(2):
            with record_function(STEP), record_function("encode"):
                torch.ones(64, 64) @ torch.ones(64, 64)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    assert "aten::matmul" in read_trace(tmp_path / "trace.json").children["encode"].children
    png, svg = write_flame(tmp_path)
    assert (png.name, svg.name) == ("step.png", "step.svg") and png.exists()
    before = svg.read_bytes()
    assert write_flame(tmp_path)[1].read_bytes() == before


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "not found -> train with trainer.profile.first_step"),
        ("{", "got no trace"),
        ("{}", "got no trace"),
        ('{"traceEvents": []}', "without a whole step -> raise trainer.profile.num_steps"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "trace.json").write_text(content)
    with pytest.raises(UserError, match=problem):
        write_flame(tmp_path)
