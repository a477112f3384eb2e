"""DuckDB as the engine: embedded, out of core; what does not fit into memory goes to files in a scratch folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from hstu_dist.errors import UserError

try:
    import duckdb
except ModuleNotFoundError as missing:
    # new in an environment that was made for an earlier version
    raise UserError("engine: DuckDB is not installed", "run `pip install duckdb`, or `make install`") from missing

_ROWS_AT_ONCE = 1 << 19


class DuckDBEngine:
    """One in-memory database."""

    def __init__(self, memory_bytes: int, scratch: Path) -> None:
        """`memory_bytes` is what its sorts and joins may use."""
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{memory_bytes >> 20}MiB",
            "temp_directory": str(scratch),
            # nothing here relies on the order of files or groups
            "preserve_insertion_order": False,
        }
        self._connection = duckdb.connect(":memory:", config=settings)

    def name_table(self, name: str, files: Sequence[Path]) -> None:
        """See `Engine`."""
        paths = ", ".join("'" + str(file).replace("'", "''") + "'" for file in files)
        self._connection.execute(f"CREATE OR REPLACE VIEW {name} AS SELECT * FROM read_parquet([{paths}])")

    def query(self, sql: str) -> Iterator[pa.RecordBatch]:
        """See `Engine`.

        Raises:
            UserError: memory or disk run out.
        """
        try:
            yield from self._connection.sql(sql).to_arrow_reader(_ROWS_AT_ONCE)
        except (duckdb.OutOfMemoryException, duckdb.IOException, pa.ArrowException) as error:
            raise UserError(
                f"duckdb: {str(error)[:300]}", "raise memory_gib, or free space beside data.path"
            ) from error

    def __enter__(self) -> DuckDBEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
