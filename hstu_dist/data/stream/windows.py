"""Time cut into windows: which window an event belongs to, what is late, and when a window is closed.

The result depends on the order of the files alone, not on when they were read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hstu_dist.data.stream.config import StreamConfig
from hstu_dist.data.stream.reading import Events


@dataclass(frozen=True)
class ClosedWindow:
    """Everything that a window will ever hold.

    Attributes:
        start, end: seconds since 1970.
        events: by user, within a user by time, events of equal time as they came.
    """

    start: int
    end: int
    events: Events


@dataclass
class Counts:
    """What happened to events so far.

    Attributes:
        read: events of all files that were not set aside.
        late: of these, events of a window that was closed; dropped or added to an open one.
        after_end: events at or after the declared end, left out.
        empty_windows: windows that were passed without an event.
    """

    read: int = 0
    late: int = 0
    after_end: int = 0
    empty_windows: int = 0


@dataclass
class Windower:
    """Open windows, and the watermark that closes them.

    Attributes:
        config: of the stream.
        counts: so far.
        watermark: seconds since 1970; None before the first event.
        open_from: the first window that is not closed; None before the first event.
        last_closed: the last window that was given; None before the first.
        pending: window → its events so far, in parts.
    """

    config: StreamConfig
    counts: Counts = field(default_factory=Counts)
    watermark: int | None = None
    open_from: int | None = None
    last_closed: int | None = None
    pending: dict[int, list[Events]] = field(default_factory=dict)

    def add(self, events: Events) -> None:
        """Takes the events of a file; may close windows."""
        end = self.config.end_seconds
        self.counts.read += len(events)
        if not len(events):
            return
        latest = int(events.seconds.max())
        if end is not None and latest >= end:
            kept = events.seconds < end
            self.counts.after_end += int((~kept).sum())
            events = events.at(kept)
        self._sort_in(events)
        self.watermark = max(latest - self.config.lateness_seconds, self.watermark or 0)
        self.open_from = max(self.config.window_of(self.watermark), self.open_from or 0)

    @property
    def has_ended(self) -> bool:
        """Whether the watermark has passed the declared end."""
        end = self.config.end_seconds
        return end is not None and self.watermark is not None and self.watermark >= end

    def close(self, all_of_them: bool = False) -> ClosedWindow | None:
        """The oldest window that is closed and was not given yet; None if there is none.

        Args:
            all_of_them: no event can come any more, every window is closed.
        """
        window = min(self.pending, default=None)
        if window is None or self.open_from is None or (window >= self.open_from and not all_of_them):
            return None
        self.open_from = max(self.open_from, window + 1)
        self.counts.empty_windows += 0 if self.last_closed is None else window - self.last_closed - 1
        self.last_closed = window
        events = Events.join(self.pending.pop(window))
        if (np.diff(events.seconds) < 0).any():
            order = np.lexsort((events.seconds, events.users))
        else:
            order = np.argsort(events.users, kind="stable")
        return ClosedWindow(self.config.start_of(window), self.config.start_of(window + 1), events.at(order))

    def state(self) -> dict[str, Any]:
        """Plain values; `pending` aside."""
        names = ("watermark", "open_from", "last_closed")
        return {**{name: getattr(self, name) for name in names}, "counts": asdict(self.counts)}

    def restore(self, state: dict[str, Any], pending: dict[int, list[Events]]) -> None:
        """Takes over what `state` gave, and the pending events."""
        self.watermark, self.open_from = state["watermark"], state["open_from"]
        self.last_closed = state["last_closed"]
        self.counts, self.pending = Counts(**state["counts"]), pending

    def _sort_in(self, events: Events) -> None:
        if not len(events):
            return
        windows = self.config.window_of(events.seconds)
        if self.open_from is not None:
            late = windows < self.open_from
            self.counts.late += int(late.sum())
            if self.config.late == "add":
                windows = np.maximum(windows, self.open_from)
            elif late.any():
                events, windows = events.at(~late), windows[~late]
        for window in np.unique(windows).tolist():
            mine = windows == window
            self.pending.setdefault(window, []).append(events if mine.all() else events.at(mine))
