"""Event logs in buckets: the same result as from disk, and every way in which a bucket fails named in a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.events import EventLog
from hstu_dist.data.prepare import prepare
from hstu_dist.errors import UserError
from tests.data.cases import log_config, write_log
from tests.data.s3 import S3, s3_server

DAYS = ("2024-01-01", "2024-01-02")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as server:
        yield server


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A log partitioned by day."""
    rng = np.random.default_rng(1)
    for number, day in enumerate(DAYS):
        folder = tmp_path / "log" / f"day={day}"
        folder.mkdir(parents=True)
        columns = {name: rng.integers(0, 20, 300) for name in ("user", "item")}
        write_log(folder / "part.parquet", {**columns, "time": 1000 * number + np.arange(300)})
    (tmp_path / "log" / "_SUCCESS").touch()
    return tmp_path / "log"


def upload(s3: S3, local: Path, bucket: str) -> None:
    s3.filesystem.create_dir(bucket)
    fs.copy_files(str(local), f"{bucket}/log", destination_filesystem=s3.filesystem)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["log", "log/*/*.parquet", "log/**/part.parquet", "log/day=2024-01-0[12]/*"])
def test_a_bucket_gives_what_the_disk_gives(s3: S3, local: Path, tmp_path: Path, pattern: str) -> None:
    if s3.filesystem.get_file_info("events").type == fs.FileType.NotFound:
        upload(s3, local, "events")
    from_disk = prepare(log_config(local, tmp_path / "disk"))
    from_bucket = prepare(log_config(s3.url(f"events/{pattern}"), tmp_path / "bucket"))
    assert from_disk.files == from_bucket.files
    assert list(from_bucket.sources) == list(from_disk.sources)
    assert all(value.startswith("size and time:") for value in from_bucket.sources.values())
    # nothing has changed, and nothing is fetched to find that out
    assert prepare(log_config(s3.url(f"events/{pattern}"), tmp_path / "bucket")) == from_bucket
    assert SequenceDataset.open(tmp_path / "bucket").lengths.sum() == 600


@pytest.mark.slow
def test_text_files_in_a_bucket(s3: S3, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    write_log(tmp_path / "log" / "a.csv", {"user": ["x", "7"], "item": [1, 2], "time": [3, 4]})
    upload(s3, tmp_path / "log", "texts")
    assert prepare(log_config(s3.url("texts/log/a.csv"), tmp_path / "set")).num_users == 2


def test_a_file_that_was_replaced_is_prepared_anew(s3: S3, local: Path, tmp_path: Path) -> None:
    upload(s3, local, "changing")
    config = log_config(s3.url("changing/log"), tmp_path / "set")
    assert prepare(config).num_events == 600
    write_log(local / f"day={DAYS[0]}" / "part.parquet", {"user": [1], "item": [2], "time": [3]})
    fs.copy_files(str(local), "changing/log", destination_filesystem=s3.filesystem)
    assert prepare(config).num_events == 301


def test_a_bucket_that_is_not_there(s3: S3, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.input: got s3://nowhere/log.*: no such file") as caught:
        EventLog(log_config(s3.url("nowhere/log"), tmp_path / "set"))
    assert caught.value.remedy


def test_a_bucket_that_vanishes(s3: S3, local: Path, tmp_path: Path) -> None:
    upload(s3, local, "fleeting")
    log = EventLog(log_config(s3.url("fleeting/log"), tmp_path / "set"))
    (tmp_path / "scratch").mkdir()
    opened = log.open(tmp_path / "scratch")
    s3.filesystem.delete_dir("fleeting")
    with pytest.raises(UserError, match=r"s3://fleeting/log/day=2024-01-01/part.parquet: cannot be read"):
        list(opened.batches())
    with pytest.raises(UserError, match="cannot be read"):
        log.open(tmp_path / "scratch")


@pytest.mark.slow
def test_a_server_that_does_not_answer(s3: S3, tmp_path: Path) -> None:
    # nobody listens on the discard port
    options = "?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    with pytest.raises(UserError, match=r"cannot be read.*Failed to connect"):
        EventLog(log_config(f"s3://events/log{options}", tmp_path / "set"))


def test_an_unknown_kind_of_address(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Unrecognized filesystem type"):
        EventLog(log_config("gopher://events/log", tmp_path / "set"))
