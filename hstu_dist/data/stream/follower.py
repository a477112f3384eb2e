"""Follows a stream in a thread of one rank: lists, reads, and keeps a few closed windows ready."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from types import TracebackType
from typing import TypeVar

from hstu_dist.data.log_files import is_hidden
from hstu_dist.data.stream.pipeline import Pipeline, moment
from hstu_dist.data.stream.source import GrewError, Settling, Source, SourceFile, first_line
from hstu_dist.errors import UserError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
"""Seconds between attempts to reach a source that fails."""
_SAY_EVERY = 60.0
"""Seconds between log lines while nothing happens."""

_JOIN_SECONDS = 10.0

_log = logging.getLogger(__name__)

T = TypeVar("T")


class _StoppedError(Exception):
    """The stream is to stop while its source fails."""


class Progress(StrEnum):
    """Where a window is."""

    READY = "ready"
    WAITING = "waiting"
    ENDED = "ended"


class Follower:
    """Makes windows until it is `ahead` of training; an error of its thread is raised by `poll`."""

    def __init__(self, source: Source, pipeline: Pipeline) -> None:
        self.source = source
        self.pipeline = pipeline
        self._config = pipeline.config
        self._settling = Settling(self._config.settle_seconds)
        # guards what both threads see: the four below
        self._changed = threading.Condition()
        self._wanted = 0
        self._made = pipeline.next_window
        self._ended = False
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        # a source that hangs must not keep the run from ending; a window is committed or not, whenever it is left
        self._thread.join(_JOIN_SECONDS)

    def poll(self, window: int, seconds: float) -> Progress:
        """Whether training may begin with a window; all windows before it are done.

        Args:
            window: its number.
            seconds: how long to wait for it.

        Raises:
            UserError: the stream cannot go on.
        """
        with self._changed:
            self._wanted = window
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._made > window or self._ended or self._error is not None, seconds)
            # what was made before an error can still be trained on
            if self._made > window:
                return Progress.READY
            if self._error is not None:
                raise self._error
            return Progress.ENDED if self._ended else Progress.WAITING

    def _run(self) -> None:
        try:
            self._follow()
        except _StoppedError:
            return
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _follow(self) -> None:
        idle_since = said = time.monotonic()
        # an interrupted session may have closed more windows than it made
        self._make_windows(at_end=False)
        while not self._stop.is_set():
            files, is_last = self._list()
            done = 0
            for file in files:
                # before the first one, too: a session that goes on may have reached the end before it was killed
                if self._stop.is_set() or self.pipeline.windower.has_ended:
                    break
                finished = self._take(file)
                done += finished
                is_last &= finished
                self._make_windows(at_end=False)
            if self.pipeline.windower.has_ended or (is_last and not self._stop.is_set()):
                self._make_windows(at_end=True)
                self._end()
                return
            now = time.monotonic()
            if done:
                idle_since = said = now
            elif now - said >= _SAY_EVERY:
                said = now
                seconds, watermark = now - idle_since, moment(self.pipeline.windower.watermark)
                _log.info("stream: no new file in %s for %.0f s; watermark %s", self.source.path, seconds, watermark)
            self._stop.wait(0 if done else self._config.poll_seconds)

    def _list(self) -> tuple[list[SourceFile], bool]:
        """New files that are settled, in order; and whether no others will come after them."""
        listed = self._insist(self.source.list, "cannot be listed")
        ends = any(file.path == self._config.end_file for file in listed)
        new = [file for file in listed if not is_hidden(file.path) and self.pipeline.is_new(file)]
        settled = self._settling.settled(new)
        return settled, ends and len(settled) == len(new)

    def _take(self, file: SourceFile) -> bool:
        """Whether a file is done with, read or set aside."""
        passed = (FileNotFoundError, PermissionError)
        try:
            content = self._insist(lambda: self.source.read(file), f"{file.path} cannot be read", passed)
        except PermissionError as error:
            self.pipeline.set_aside(file, f"cannot be read ({first_line(error)})")
            return True
        except (GrewError, FileNotFoundError) as error:
            # listed again, it settles again
            _log.info("stream: %s is left for later: %s", file.path, first_line(error))
            return False
        self.pipeline.take(file, content, time.time())
        return True

    def _insist(self, action: Callable[[], T], problem: str, passed: tuple[type[OSError], ...] = ()) -> T:
        """What `action` gives, tried again with growing pauses while it fails; `passed` are raised at once."""
        began, pause = time.monotonic(), _FIRST_PAUSE
        while True:
            try:
                return action()
            except OSError as error:
                if isinstance(error, passed):
                    raise
                failing = time.monotonic() - began
                said = f"stream {self.source.path}: {problem} ({first_line(error)})"
                if failing + pause > self._config.give_up_seconds:
                    raise UserError(
                        f"{said}, tried for {failing:.0f} s",
                        "check path, network and credentials; the same command continues",
                    ) from error
                _log.warning("%s; trying again in %.1f s", said, pause)
            if self._stop.wait(pause):
                raise _StoppedError
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _make_windows(self, at_end: bool) -> None:
        """All windows that are closed, each when there is room for it."""
        while not self._stop.is_set() and self._has_room() and self.pipeline.advance(at_end) is not None:
            with self._changed:
                self._made = self.pipeline.next_window
                self._changed.notify_all()

    def _has_room(self) -> bool:
        """Waits until training is near; False if the stream is to stop."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stop.is_set() or self.pipeline.next_window <= self._wanted + self._config.ahead
            )
        return not self._stop.is_set()

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
