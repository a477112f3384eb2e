"""Where the time of a training step goes: a trace's nested events, merged by name over all steps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hstu_dist.errors import UserError
from hstu_dist.report.plots import save_flame

TRACE_FILE = "trace.json"
STEP = "step"
"""Name of the event that the trainer puts around each step."""


@dataclass
class Frame:
    """Events of one name below the same parent.

    Attributes:
        name: of the events.
        seconds: inside them, children included, in mean over the steps.
        children: by name, in the order they first occur.
    """

    name: str
    seconds: float = 0.0
    children: dict[str, Frame] = field(default_factory=dict)

    def child(self, name: str) -> Frame:
        """The frame of that name below this one."""
        return self.children.setdefault(name, Frame(name))


def read_trace(path: Path) -> Frame:
    """Time of a step by its parts, from a trace in Chrome's format.

    Only the thread that runs the steps counts: on a GPU that is the time of launching work, not of doing it.

    Raises:
        UserError: there is no trace, it is no trace, or it has no whole step.
    """
    try:
        found = list(_events(json.loads(path.read_text())["traceEvents"]))
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found", "train with trainer.profile.first_step=10") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: got no trace in Chrome's format", "train again with trainer.profile") from error
    steps = [event for event in found if event.name == STEP]
    if not steps:
        raise UserError(f"{path}: got a trace without a whole step", "raise trainer.profile.num_steps")
    root = Frame(STEP, sum(step.seconds for step in steps) / len(steps))
    for step in steps:
        inside = [e for e in found if e.thread == step.thread and e is not step and step.contains(e)]
        _add(root, inside, len(steps))
    return root


def write_flame(folder: Path) -> tuple[Path, Path]:
    """Draws the trace of a run folder into it.

    Returns:
        Paths of PNG and SVG.

    Raises:
        UserError: as `read_trace`.
    """
    root = read_trace(folder / TRACE_FILE)
    title = f"{folder.name}: {root.seconds * 1e3:.1f} ms a step, traced"
    return save_flame(list(_boxes(root, 0.0, 0)), title, folder / "step")


@dataclass(frozen=True)
class _Event:
    name: str
    thread: tuple[Any, Any]
    start: float
    seconds: float

    @property
    def end(self) -> float:
        return self.start + self.seconds

    def contains(self, other: _Event) -> bool:
        return self.start <= other.start and other.end <= self.end


def _events(raw: Iterable[dict[str, Any]]) -> Iterator[_Event]:
    """Those with a duration that ran on a CPU; microseconds become seconds."""
    for event in raw:
        if event.get("ph") == "X" and event.get("cat") in ("cpu_op", "user_annotation"):
            thread = event.get("pid"), event.get("tid")
            yield _Event(str(event["name"]), thread, event["ts"] / 1e6, event["dur"] / 1e6)


def _add(root: Frame, events: list[_Event], steps: int) -> None:
    """Adds one step's events; they nest, so that an event's parent is the last one that has not ended."""
    open_events: list[tuple[_Event, Frame]] = []
    for event in sorted(events, key=lambda e: (e.start, -e.seconds)):
        while open_events and not open_events[-1][0].contains(event):
            open_events.pop()
        parent = open_events[-1][1] if open_events else root
        frame = parent.child(_plain(event.name))
        frame.seconds += event.seconds / steps
        open_events.append((event, frame))


def _plain(name: str) -> str:
    """Without what the autograd engine puts in front."""
    return name.removeprefix("autograd::engine::evaluate_function: ")


def _boxes(frame: Frame, left: float, depth: int) -> Iterator[tuple[str, int, float, float]]:
    """(name, depth, left edge, width) in milliseconds of a frame and all below it, largest first."""
    yield frame.name, depth, left, frame.seconds * 1e3
    for child in sorted(frame.children.values(), key=lambda c: -c.seconds):
        yield from _boxes(child, left, depth + 1)
        left += child.seconds * 1e3
