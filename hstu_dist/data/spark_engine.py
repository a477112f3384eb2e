"""Spark as the engine: local, or the cluster that the environment's Spark configuration names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import pyarrow as pa

from hstu_dist.errors import UserError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_ROWS_AT_ONCE = 1 << 19


class SparkEngine:
    """One session; staged files must lie where all executors see them under the same path."""

    def __init__(self) -> None:
        """Raises UserError: PySpark or Java is missing, or the cluster does not answer."""
        self._session = _session()

    def name_table(self, name: str, files: Sequence[Path]) -> None:
        """See `Engine`."""
        paths = [hadoop_path(file) for file in files]
        self._session.read.parquet(*paths).createOrReplaceTempView(name)

    def query(self, sql: str) -> Iterator[pa.RecordBatch]:
        """See `Engine`."""
        yield from self._session.sql(sql).toArrow().to_batches(_ROWS_AT_ONCE)

    def __enter__(self) -> SparkEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.stop()


def hadoop_path(file: Path) -> str:
    """A local file as Hadoop names it: nothing is percent-encoded, and what means a pattern is escaped."""
    return "file://" + re.sub(r"([\\{}\[\]*?])", r"\\\1", str(file.resolve()))


def _session() -> SparkSession:
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise UserError(
            "engine: got spark, but PySpark is not installed",
            "pip install '.[spark]' in the clone; it needs Java 17",
        ) from error
    try:
        # the results of a pass come to this process: bounded by the size of a pass, not by this limit
        builder = SparkSession.builder.appName("hstu_dist prepare").config("spark.driver.maxResultSize", "0")
        return builder.getOrCreate()
    except Exception as error:  # Py4J and Java have no common class of errors
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"engine: Spark does not start ({type(error).__name__}: {reason[:200]})",
            "check JAVA_HOME (Java 17) and SPARK_CONF_DIR",
        ) from error
