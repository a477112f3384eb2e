"""What is known of the users of a log: a table of its own, joined to the users that a data set keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hstu_dist.data.column_tables import column_tables
from hstu_dist.data.columns import Column, Reading, ids_of, reading_of
from hstu_dist.data.config import EventsConfig
from hstu_dist.data.events import Origin
from hstu_dist.data.log_files import find_files, fingerprints
from hstu_dist.data.schema import CONTEXT_FILE
from hstu_dist.data.vocabulary import Vocabulary
from hstu_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class UserFeatures:
    """Checked features, one row a user.

    Attributes:
        users: raw ids, each once.
        columns: name → values, int64 or text.
        source: where they came from, for messages.
    """

    users: pa.Array
    columns: dict[str, pa.Array]
    source: str

    @classmethod
    def read(cls, config: EventsConfig, scratch: Path) -> UserFeatures | None:
        """The file that a configuration names; None: it names none.

        Args:
            config: of the log.
            scratch: an empty folder for copies of text.

        Raises:
            UserError: names the file, row, column and value that cannot be used, or a user who is there twice.
        """
        if config.user_features is None:
            return None
        names = [config.user_column, *config.contextual_columns]
        tables = column_tables(find_files(config.user_features), names, scratch)
        starts = [sum(table.num_rows for table in tables[:index]) for index in range(len(tables))]
        origin = Origin(files=tuple(table.file.shown for table in tables), starts=tuple(starts))
        whole = pa.concat_tables(pa.Table.from_batches(list(t.batches()), schema=t.schema) for t in tables)
        values = {}
        for name in names:
            texts = not tables[0].file.is_parquet
            reading = reading_of(whole[name]) if texts else Reading.TEXT
            values[name] = ids_of(Column(name=name, values=whole[name], locate=origin.locate, reading=reading))
        users = values.pop(config.user_column)
        if len(users) != pc.count_distinct(users).as_py():
            raise UserError(f"{config.user_features}: a user is there more than once", "keep one row for each user")
        return cls(users=users, columns=values, source=config.user_features)

    def write(self, folder: Path) -> None:
        """Write the features of the users of a data set, in their order.

        Args:
            folder: of the data set, whose vocabulary is written.

        Raises:
            UserError: names a user without features.
        """
        wanted = Vocabulary.users(folder).raw
        known = self.users.cast(wanted.type) if pa.types.is_string(wanted.type) else self.users
        if known.type != wanted.type:
            raise UserError(
                f"{self.source}: got users of type {known.type}, the log has {wanted.type}", "use the same ids in both"
            )
        places = pc.index_in(wanted, known)
        if places.null_count:
            missing = wanted[pc.index(pc.is_null(places), True).as_py()].as_py()
            raise UserError(
                f"{self.source}: got no features of user {missing!r} and {places.null_count - 1} others of the log",
                "add their rows, or leave out data.user_features and data.contextual_columns",
            )
        table = pa.table({name: values.take(places) for name, values in self.columns.items()})
        pq.write_table(table, folder / CONTEXT_FILE, compression="zstd", write_page_checksum=True)


def features_fingerprint(config: EventsConfig) -> dict[str, str]:
    """Hash of every file of features, by a name of its own."""
    if config.user_features is None:
        return {}
    found = fingerprints(find_files(config.user_features))
    return {f"user features: {name}": value for name, value in found.items()}
