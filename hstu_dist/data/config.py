"""What data to train on and how it is fed: checked settings, no torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from hstu_dist.data.split import Split
from hstu_dist.validation import STRICT


class TimestampUnit(StrEnum):
    """Unit of an integer or floating timestamp column, counted since 1970-01-01 UTC."""

    S = "s"
    MS = "ms"
    US = "us"


class Duplicates(StrEnum):
    """What to do with events of the same user, item and timestamp: stop, keep the first, or keep all."""

    ERROR = "error"
    DROP = "drop"
    KEEP = "keep"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MovieLensConfig:
    """One of the public MovieLens rating sets; every rating is an event, its stars are the action.

    Attributes:
        kind: `ml1m` (6,040 users) or `ml100k` (943 users).
        path: folder of the prepared data set; empty: data/<kind>.
        max_length: history tokens given to the model; older events are cut at loading, not at preparation.
        archive: the official archive (ml-1m.zip) or its ratings file, downloaded by hand; None: fetch it.
    """

    kind: Literal["ml1m", "ml100k"]
    path: str = ""
    max_length: int = Field(default=200, gt=0)
    archive: str | None = None

    def __post_init__(self) -> None:
        _fill_path(self)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EventsConfig:
    """Anyone's event log: one row an event, in CSV or Parquet.

    Attributes:
        kind: `events`.
        input: a file, a folder (searched recursively) or a glob of .csv, .tsv, .csv.gz, .tsv.gz or .parquet
            files of one format; None: only an already prepared data set can be used.
        path: folder of the prepared data set; empty: data/<kind>.
        max_length: history tokens given to the model; older events are cut at loading, not at preparation.
        user_column: int64 or text ids.
        item_column: int64 or text ids.
        timestamp_column: integers, floats, or dates (UTC, whose unit comes from the column).
        action_column: integers in [0, 2^31); None: every action is 0.
        timestamp_unit: unit of a numeric timestamp column; stored are whole seconds, ordered is by the full value.
        duplicates: what to do with repeated (user, item, timestamp).
        min_user_events: users with fewer events are left out.
        min_item_events: items with fewer events are left out; both limits hold in the result.
    """

    kind: Literal["events"] = "events"
    input: str | None = None
    path: str = ""
    max_length: int = Field(default=200, gt=0)
    user_column: str = Field(default="user_id", min_length=1)
    item_column: str = Field(default="item_id", min_length=1)
    timestamp_column: str = Field(default="timestamp", min_length=1)
    action_column: str | None = None
    timestamp_unit: TimestampUnit = TimestampUnit.S
    duplicates: Duplicates = Duplicates.ERROR
    min_user_events: int = Field(default=1, ge=1)
    min_item_events: int = Field(default=1, ge=1)

    def __post_init__(self) -> None:
        _fill_path(self)
        columns = [self.user_column, self.item_column, self.timestamp_column, self.action_column]
        if len(set(columns)) != len(columns):
            raise ValueError(f"user, item, timestamp and action column: got {columns}, expected four different names")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AmazonConfig:
    """A category of the Amazon reviews of 2014; every rating is an event, its stars are the action.

    Kept are users and items with at least 5 events each (5-core). A repeat of the same user, item and day counts once.

    Attributes:
        kind: `amazon_beauty`, `amazon_sports` (Sports and Outdoors) or `amazon_toys` (Toys and Games).
        path: folder of the prepared data set; empty: data/<kind>.
        max_length: history tokens given to the model; older events are cut at loading, not at preparation.
        source: path or URL of the category's reviews (.json, .json.gz) or ratings (.csv, .csv.gz); None: fetch the
            official 5-core reviews.
    """

    kind: Literal["amazon_beauty", "amazon_sports", "amazon_toys"]
    path: str = ""
    max_length: int = Field(default=50, gt=0)
    source: str | None = Field(default=None, min_length=1)

    def __post_init__(self) -> None:
        _fill_path(self)


DataConfig = Annotated[MovieLensConfig | AmazonConfig | EventsConfig, Field(discriminator="kind")]
"""Any data set that `prepare` can make."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoaderConfig:
    """Which batches are made of a data set; independent of the number of ranks.

    Attributes:
        split: which part of every sequence.
        global_batch_size: sequences in a batch, summed over all ranks.
        max_length: most recent inputs kept of every sequence.
        seed: with the epoch number, determines the order.
        shuffle: a new order every epoch, or data set order.
    """

    split: Split
    global_batch_size: int = Field(gt=0)
    max_length: int = Field(default=200, gt=0)
    seed: int = Field(default=0, ge=0)
    shuffle: bool = True


def prepare_command(config: MovieLensConfig | AmazonConfig | EventsConfig) -> str:
    """What makes the data set of a configuration."""
    words = ["python -m hstu_dist prepare", f"data={config.kind}"]
    words += ["data.input=FILE"] if isinstance(config, EventsConfig) else []
    words += [f"data.path={config.path}"] if config.path != _default_path(config.kind) else []
    return " ".join(words)


def _default_path(kind: str) -> str:
    return f"data/{kind}"


def _fill_path(config: MovieLensConfig | AmazonConfig | EventsConfig) -> None:
    if not config.path:
        object.__setattr__(config, "path", _default_path(config.kind))
