"""Events that code of the user's own gives, checked like any log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from hstu_dist.data.config import EventsConfig, PluginDataConfig
from hstu_dist.data.events import EventLog, OpenLog
from hstu_dist.errors import UserError
from hstu_dist.plugins import find

_COLUMNS = ("user_id", "item_id", "timestamp")
_ACTION = "action"


class EventSource(Protocol):
    """What the target of `data=plugin` gives when it is called with `data.settings` as keywords."""

    def fingerprint(self) -> Mapping[str, str]:
        """What the events depend on, name → version or hash; the data set is made again when it changes."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All events: user_id and item_id (int64 or text), timestamp (seconds or dates), and action if there is one."""


class PluginSource:
    """The events of a configured target."""

    def __init__(self, config: PluginDataConfig) -> None:
        self.target = config.target
        try:
            self.source: EventSource = find(config.target)(**config.settings)
        except TypeError as error:
            raise UserError(f"{config.target}: {error}", "give the keys that it expects as data.settings") from error

    def fingerprint(self) -> dict[str, str]:
        """The source's own, with its name."""
        return {"target": self.target, **self.source.fingerprint()}

    def open(self, scratch: Path) -> OpenLog:
        """Writes the events down and checks their columns and types.

        Args:
            scratch: an empty folder.

        Raises:
            UserError: columns or types are not those of a log, or there are no events.
        """
        # named in messages about rows
        file = scratch / f"{self.target.partition(':')[2]}.parquet"
        writer = None
        try:
            for batch in self.source.batches():
                writer = writer or pq.ParquetWriter(file, batch.schema, compression="zstd")
                writer.write_batch(batch)
        except (pa.ArrowException, ValueError) as error:
            raise UserError(f"{self.target}: {error}", "give batches of one schema") from error
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            raise UserError(f"{self.target}: gave no events", "check data.settings")
        names: dict[str, Any] = dict(zip(("user_column", "item_column", "timestamp_column"), _COLUMNS, strict=True))
        if _ACTION in pq.read_schema(file).names:
            names["action_column"] = _ACTION
        return EventLog(EventsConfig(input=str(file), **names)).open(scratch)
