"""Where a stream comes from and how its time is cut into windows: checked settings, no torch."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import Field
from pydantic.dataclasses import dataclass

from hstu_dist.data.config import DataSetConfig, TimestampUnit
from hstu_dist.validation import STRICT

Seconds = TypeVar("Seconds", int, npt.NDArray[np.int64])

_DAY = 86_400
ItemIds = Literal["dense", "hashed", "raw"]
WINDOW_SECONDS = {"minute": 60, "hour": 3600, "day": _DAY, "week": 7 * _DAY}
_MONDAY = 4 * _DAY
"""1970-01-05, from which weeks are counted."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StreamConfig:
    """A folder or bucket prefix that event files (.parquet, .csv, .tsv, .gz) keep arriving in; see docs/streaming.md.

    Files are read once, in the order of their names among those that are there; those whose path has a part that begins
    with `.` or `_` are left alone. A window of time is trained on when it is closed: when the watermark, the latest
    event time read minus `lateness_seconds`, passes its end, or the stream ends.

    Attributes:
        kind: `stream`.
        path: a folder, or a URI of pyarrow.fs such as `s3://bucket/prefix?region=eu-west-1`.
        num_items: rows of the item table.
        item_ids: dense: items are numbered 0 to num_items - 1; hashed: any integer or text is hashed to a row, so that
            new items need no vocabulary, and items that share a row share its embedding; raw: any integer or text goes
            to the vocabulary of the item table, embedding.vocabulary, text as a hash of 64 bits.
        max_length: inputs given to the model: new events, and the user's most recent history before them.
        user_column: int64 or text ids.
        item_column: int64 or text ids.
        timestamp_column: integers, floats, or dates (UTC, whose unit comes from the column).
        action_column: integers in [0, 2^31); null: every action is 0.
        timestamp_unit: unit of a numeric timestamp column.
        window_length: of every window, in UTC; weeks begin on Mondays.
        lateness_seconds: how much older than the latest event an event may be when it is read.
        late: events of a window that is closed: drop them, or add them to the oldest window that is open.
        max_skew_seconds: a file with an event that much ahead of this machine's clock is refused.
        settle_seconds: a file is read once its size and modification time stood still that long; 0 where files appear
            whole, by renaming or in an object store.
        poll_seconds: time between two listings while nothing is there to do.
        give_up_seconds: how long listing or reading may fail before the run ends with an error.
        ahead: closed windows that wait for training, at most; reading stops meanwhile.
        history_mib: memory for the histories of users in MiB; the users not seen for the longest time leave.
        end: ISO date or time (UTC without an offset); later events are left out, and the stream ends when the
            watermark passes it; null: it goes on.
        end_file: name of a file at the top of `path` that says that no more files will come.
    """

    kind: Literal["stream"] = "stream"
    path: str = Field(min_length=1)
    num_items: int = Field(gt=0, le=2**31)
    item_ids: ItemIds = "hashed"
    max_length: int = Field(default=200, gt=0)
    user_column: str = Field(default="user_id", min_length=1)
    item_column: str = Field(default="item_id", min_length=1)
    timestamp_column: str = Field(default="timestamp", min_length=1)
    action_column: str | None = None
    timestamp_unit: TimestampUnit = TimestampUnit.S
    window_length: Literal["minute", "hour", "day", "week"] = "hour"
    lateness_seconds: int = Field(default=0, ge=0)
    late: Literal["drop", "add"] = "drop"
    max_skew_seconds: int = Field(default=_DAY, ge=0)
    settle_seconds: float = Field(default=10.0, ge=0)
    poll_seconds: float = Field(default=5.0, gt=0)
    give_up_seconds: float = Field(default=600.0, ge=0)
    ahead: int = Field(default=2, ge=1)
    history_mib: float = Field(default=1024.0, gt=0)
    end: str | None = None
    end_file: str = Field(default="_SUCCESS", min_length=1)

    def __post_init__(self) -> None:
        columns = self.columns
        if len(set(columns)) != len(columns):
            raise ValueError(f"user, item, timestamp and action column: got {columns}, expected different names")
        if self.end is not None:
            try:
                datetime.fromisoformat(self.end)
            except ValueError:
                raise ValueError(f"end: got {self.end}, expected an ISO date or time such as 2026-01-31") from None

    @property
    def columns(self) -> list[str]:
        """Names of the columns that are read."""
        named = [self.user_column, self.item_column, self.timestamp_column]
        return [*named, self.action_column] if self.action_column is not None else named

    @property
    def end_seconds(self) -> int | None:
        """`end` in seconds since 1970."""
        if self.end is None:
            return None
        moment = datetime.fromisoformat(self.end)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())

    def window_of(self, seconds: Seconds) -> Seconds:
        """Number of the window that each time lies in, counted from 1970."""
        return (seconds - self._first) // WINDOW_SECONDS[self.window_length]

    def start_of(self, window: int) -> int:
        """Seconds since 1970 at which a window begins."""
        return self._first + window * WINDOW_SECONDS[self.window_length]

    @property
    def _first(self) -> int:
        return _MONDAY if self.window_length == "week" else 0


FeedConfig = Annotated[DataSetConfig | StreamConfig, Field(discriminator="kind")]
"""What a run trains on: a prepared data set or a stream, told apart by `kind` when read."""
