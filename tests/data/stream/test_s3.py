"""The same stream from a real S3 API: a server on loopback, pyarrow's own client."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from hstu_dist.data.stream.follower import Follower, Progress
from hstu_dist.data.stream.source import Source, check_reachable
from hstu_dist.errors import UserError
from tests.data.stream.cases import config_of, drain, events_of, pipeline_of, same, table_of, write_stream

moto = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"{host}:{port}"
    running.stop()


def client_of(server: str) -> Any:
    return fs.S3FileSystem(
        endpoint_override=f"http://{server}",
        access_key="k",
        secret_key="s",
        region="us-east-1",
        allow_bucket_creation=True,
        allow_bucket_deletion=True,
    )


def uri_of(server: str, prefix: str) -> str:
    return f"s3://k:s@{prefix}?endpoint_override={server}&scheme=http&region=us-east-1"


def put(client: Any, key: str, content: bytes) -> None:
    with client.open_output_stream(key) as out:
        out.write(content)


def parquet(events: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table_of(events), sink)
    return sink.getvalue()


@pytest.mark.slow
def test_a_bucket_gives_the_windows_of_a_folder(server: str, tmp_path: Path) -> None:
    client, parts = client_of(server), events_of(4)
    client.create_dir("events")
    for number, part in enumerate(parts):
        put(client, f"events/log/hour={number:04d}/part-0.parquet", parquet(part))
    put(client, "events/log/hour=0001/broken.parquet", b"no Parquet")
    put(client, "events/other/part-0.parquet", b"of somebody else")
    uri = uri_of(server, "events/log")
    check_reachable(uri)
    expected = drain(pipeline_of(config_of(write_stream(tmp_path / "files", parts)), tmp_path / "a"))
    pipeline = pipeline_of(config_of(uri), tmp_path / "b")
    with Follower(Source(uri), pipeline) as follower:
        assert [follower.poll(n, 20) for n in range(3)] == [Progress.READY] * 3
        assert follower.poll(3, 0.2) is Progress.WAITING
        put(client, "events/log/_SUCCESS", b"")
        assert [follower.poll(n, 20) for n in (3, 4)] == [Progress.READY, Progress.ENDED]
        # restarted, nothing is read again
    with Follower(Source(uri), pipeline_of(config_of(uri), tmp_path / "b")) as follower:
        assert follower.poll(4, 20) is Progress.ENDED
    found = [pipeline.archive.open(number) for number in pipeline.archive.numbers()]
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert "hour=0001/broken.parquet" in (tmp_path / "b" / "quarantine.jsonl").read_text()


@pytest.mark.slow
def test_a_vanished_bucket_ends_the_run_after_a_while(server: str, tmp_path: Path) -> None:
    client, uri = client_of(server), uri_of(server, "going/log")
    client.create_dir("going")
    put(client, "going/log/part-0.parquet", parquet(events_of(1).pop()))
    with Follower(Source(uri), pipeline_of(config_of(uri, give_up_seconds=1.0), tmp_path)) as follower:
        assert follower.poll(0, 0.3) is Progress.WAITING
        client.delete_dir("going")
        with pytest.raises(UserError, match="cannot be listed"):
            follower.poll(0, 30)


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_refused(server: str) -> None:
    with pytest.raises(UserError, match=r"cannot be listed .*NO_SUCH_BUCKET") as caught:
        check_reachable(uri_of(server, "nobody/log"))
    assert "k:s" not in str(caught.value)
