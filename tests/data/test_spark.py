"""The same statements on Spark give the same files, byte by byte."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu_dist.data.config import EventsConfig, PreparationConfig
from hstu_dist.data.flat_columns import EVENTS_FILE, OFFSETS_FILE
from hstu_dist.data.prepare import prepare
from hstu_dist.data.spark_engine import hadoop_path
from hstu_dist.errors import UserError
from tests.data.cases import log_config, write_log

HAS_SPARK = importlib.util.find_spec("pyspark") is not None and shutil.which("java") is not None
CASES: list[dict[str, Any]] = [
    {"duplicates": "drop", "min_user_events": 3, "min_item_events": 4},
    {"duplicates": "keep"},
]


def log_of(tmp_path: Path, text: bool) -> Path:
    rng = np.random.default_rng(5)
    users, items = rng.integers(-40, 40, 2000), rng.integers(0, 300, 2000)
    names = [f"é{user}" if user % 2 else f"{user}" for user in users]
    times = rng.choice([0.0, 2.5, 1e9, 3.25], 2000)
    return write_log(tmp_path / "log.parquet", {"user": names if text else users, "item": items, "time": times})


def test_hadoop_reads_paths_as_they_are() -> None:
    assert hadoop_path(Path("/data/date=2026-01-31/jürgen 1")) == "file:///data/date=2026-01-31/jürgen 1"
    assert hadoop_path(Path("/a[1]/b{2}*?")) == r"file:///a\[1\]/b\{2\}\*\?"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not HAS_SPARK, reason="needs the extra `spark` and Java 17")
@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("text", [False, True])
def test_spark_equals_duckdb(tmp_path: Path, settings: dict[str, Any], text: bool) -> None:
    log = log_of(tmp_path, text)

    def prepared(engine: str) -> tuple[EventsConfig, dict[str, str]]:
        # with what a URL would encode
        config = log_config(log, tmp_path / "date=1 ü" / engine, **settings)
        return config, prepare(config, PreparationConfig(engine=engine)).files  # type: ignore[arg-type]

    (embedded, files), (spark, spark_files) = prepared("duckdb"), prepared("spark")
    assert files == spark_files
    for name in (OFFSETS_FILE, EVENTS_FILE):
        one, other = (Path(config.path) / "columns" / name for config in (embedded, spark))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.skipif(HAS_SPARK, reason="Spark is here")
def test_without_spark_the_way_to_it_is_told(tmp_path: Path) -> None:
    config = log_config(log_of(tmp_path, False), tmp_path / "set", duplicates="keep")
    with pytest.raises(UserError, match=r"engine: (got spark, but PySpark is not installed|Spark does not start)"):
        prepare(config, PreparationConfig(engine="spark"))
