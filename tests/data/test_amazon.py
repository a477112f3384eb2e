"""Amazon reviews: both official formats, 5-core against brute force, and every wrong file named."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hstu_dist.commands.train import train
from hstu_dist.config import compose
from hstu_dist.data import amazon
from hstu_dist.data.amazon import Amazon
from hstu_dist.data.config import AmazonConfig
from hstu_dist.data.dataset import SequenceDataset
from hstu_dist.data.prepare import prepare
from hstu_dist.data.schema import file_hash
from hstu_dist.data.vocabulary import Vocabulary
from hstu_dist.errors import UserError
from tests.data.amazon_cases import (
    Rating,
    random_ratings,
    rating_line,
    review_line,
    walks,
    write_lines,
    write_ratings,
)
from tests.distributed.ranks import run_ranks

NAMES = ["reviews_Beauty_5.json.gz", "reviews_Beauty_5.json", "ratings_Beauty.csv", "mine.csv.gz"]
GOOD = Rating("A1YJEY40YUW4SE", "7806397051", 3, 1391040000)
# nobody listens on the discard port
UNREACHABLE = "http://127.0.0.1:9"


def config_of(source: Path | str | None, folder: Path) -> AmazonConfig:
    return AmazonConfig(
        kind="amazon_beauty", source=None if source is None else str(source), path=str(folder / "data" / "set")
    )


def read(file: Path) -> list[Rating]:
    events = Amazon(config_of(file, file.parent)).read()
    assert events.actions.dtype == np.int32 and events.seconds.dtype == np.int64
    columns = (events.users.to_pylist(), events.items.to_pylist(), events.actions.tolist(), events.seconds.tolist())
    return [Rating(*row) for row in zip(*columns, strict=True)]


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        Amazon(config_of(file, file.parent)).read()
    assert "reviews_Beauty_5.json.gz" in caught.value.remedy and "data.source=FILE" in caught.value.remedy
    return caught.value.problem


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_are_read_as_they_are(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # hundreds of blocks, whose borders cut lines
    monkeypatch.setattr(amazon, "BLOCK_BYTES", 1000)
    ratings = random_ratings(0)
    assert read(write_ratings(tmp_path / name, ratings)) == ratings


def test_lines_of_review_files_differ(tmp_path: Path) -> None:
    lines = [
        review_line(GOOD, reviewerName=...),
        review_line(GOOD, overall=3, helpful="none", vote=None),
        review_line(GOOD, style={"Size:": " 3"}) + "\r",
        "",
        review_line(GOOD, reviewerID="#oc-R103C0QSV1DF5E"),
    ]
    file = write_lines(tmp_path / "r.json", lines)
    assert read(file) == [GOOD, GOOD, GOOD, GOOD._replace(user="#oc-R103C0QSV1DF5E")]


def test_a_file_that_the_browser_unpacked_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "reviews_Beauty_5.json.gz").write_text(review_line(GOOD))
    assert read(tmp_path / "reviews_Beauty_5.json.gz") == [GOOD]


def test_the_text_of_reviews_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amazon, "BLOCK_BYTES", 1 << 16)
    file = write_lines(tmp_path / "r.json.gz", [review_line(GOOD, reviewText="long " * 2000)] * 2000)
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        assert len(read(file)) == 2000
        peak = pool.max_memory() + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    # of 20 MB of text
    assert peak < 4 << 20


def core_of(ratings: list[Rating]) -> list[Rating]:
    """Repeats left out, then one rare user or item at a time."""
    first = {(r.user, r.item, r.time): r for r in reversed(ratings)}
    kept = [r for r in ratings if first.pop((r.user, r.item, r.time), None)]
    while True:
        counts = Counter(name for r in kept for name in (r.user, r.item))
        rare = next((name for name, count in counts.items() if count < 5), None)
        if rare is None:
            return kept
        kept = [r for r in kept if rare not in (r.user, r.item)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reviews_Beauty.json.gz", "ratings_Beauty.csv"])
@pytest.mark.parametrize("seed", range(4))
def test_5_core_is_the_fixed_point(tmp_path: Path, name: str, seed: int) -> None:
    ratings = random_ratings(seed)
    core = core_of(ratings)
    # one pass would not do, and something is left
    once = Counter(name for r in set(ratings) for name in (r.user, r.item))
    assert 0 < len(core) < sum(min(once[r.user], once[r.item]) >= 5 for r in set(ratings))
    manifest = prepare(config_of(write_ratings(tmp_path / name, ratings), tmp_path))
    data = SequenceDataset.open(tmp_path / "data" / "set")
    users, items = (load(tmp_path / "data" / "set") for load in (Vocabulary.users, Vocabulary.items))
    assert manifest.num_events == len(core) and min(users.counts) >= 5 and min(items.counts) >= 5
    # days are short of ties only by luck: the order within one is the file's
    expected = sorted(core, key=lambda r: (r.user, r.time))
    columns = (
        users.decode(np.repeat(np.arange(data.num_sequences), data.lengths)),
        items.decode(data.item_ids),
        data.actions.tolist(),
        data.timestamps.tolist(),
    )
    assert [Rating(*row) for row in zip(*columns, strict=True)] == expected
    assert any(a[0] == b[0] and a[3] == b[3] for a, b in pairwise(expected))


def test_a_5_core_stays_as_it_is(tmp_path: Path) -> None:
    ratings = walks()
    manifest = prepare(config_of(write_ratings(tmp_path / NAMES[0], ratings), tmp_path))
    assert (manifest.name, manifest.num_events) == ("amazon_beauty", len(ratings))
    assert manifest.sources == {NAMES[0]: file_hash(tmp_path / NAMES[0])}


def test_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no event is left: got 1 events"):
        prepare(config_of(write_ratings(tmp_path / NAMES[0], [GOOD]), tmp_path))


BAD_REVIEWS = [
    (review_line(GOOD)[:-20], "JSON parse error: Invalid encoding in string"),
    ("not JSON", "JSON parse error: Invalid value"),
    (repr(json.loads(review_line(GOOD))), "is a Python literal, expected strict JSON; JSON parse error"),
    (f"[{review_line(GOOD)}]", "JSON parse error: Column() changed from object to array"),
    (review_line(GOOD, asin=...), "asin: got None, expected an id of 10 letters and digits"),
    (review_line(GOOD, asin="B00"), "asin: got 'B00'"),
    (review_line(GOOD, asin=7806397051), "changed from string to number"),
    (review_line(GOOD, reviewerID=None), "reviewerID: got None, expected an id"),
    (review_line(GOOD, reviewerID=""), "reviewerID: got ''"),
    (review_line(GOOD, overall=3.5), "overall: got 3.5, expected 1 to 5 stars"),
    (review_line(GOOD, overall=0), "overall: got 0.0"),
    (review_line(GOOD, overall=float("nan")), "overall: got nan"),
    (review_line(GOOD, overall="5"), "changed from number to string"),
    (review_line(GOOD, overall=True), "changed from number to boolean"),
    (review_line(GOOD, unixReviewTime=1.5), "couldn't parse:1.5"),
    (
        review_line(GOOD, unixReviewTime=1_500_000_000),
        "unixReviewTime: got 1500000000, expected a second of 1996 to 2014",
    ),
    (review_line(GOOD, unixReviewTime=1_391_040_000_000), "unixReviewTime: got 1391040000000"),
    (review_line(GOOD, unixReviewTime=-1), "unixReviewTime: got -1"),
]
BAD_RATINGS = [
    ("user,item,rating,timestamp", "conversion error to double: invalid value 'rating'"),
    ("userId,movieId,rating", "Expected 4 columns, got 3"),
    ("1,31,2.0,1260759144", "item: got '31', expected an id of 10 letters and digits"),
    (rating_line(GOOD).replace(",", ";"), "Expected 4 columns, got 1"),
    (rating_line(GOOD) + ",1", "Expected 4 columns, got 5"),
    (rating_line(GOOD).replace("3.0", "2.5"), "rating: got 2.5, expected 1 to 5 stars"),
    (rating_line(GOOD).replace("3.0", ""), "rating: got None"),
    (rating_line(GOOD).replace("1391040000", "2014-01-30"), "conversion error to int64: invalid value '2014-01-30'"),
    (rating_line(GOOD).replace(GOOD.user, ""), "user: got ''"),
    (rating_line(GOOD).replace(GOOD.user, "zoë"), "user: got 'zoë'"),
]


@pytest.mark.parametrize("position", [0, 3, 40])
@pytest.mark.parametrize(
    ("name", "line", "message"),
    [*((NAMES[0], *bad) for bad in BAD_REVIEWS), *((NAMES[2], *bad) for bad in BAD_RATINGS)],
    ids=[bad[1] for bad in (*BAD_REVIEWS, *BAD_RATINGS)],
)
def test_the_first_bad_line_is_named(
    tmp_path: Path, position: int, name: str, line: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amazon, "LINES_AT_ONCE", 16)
    lines = [(review_line if "json" in name else rating_line)(GOOD)] * 50
    lines[10] = ""
    lines[position] = lines[position + 5] = line
    problem = refusal(write_lines(tmp_path / name, lines))
    assert f"{name} line {position + 1}: " in problem and message in problem, problem
    assert "row" not in problem or name == NAMES[2]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    good, bad = review_line(GOOD).encode(), review_line(GOOD, reviewerID="?").encode()
    file.write_bytes(good + b"\n" + bad.replace(b"?", b"A\xff") + b"\n")
    assert r"r.json line 2: reviewerID: got 'A\\xff', expected an id" in refusal(file)


def test_a_line_of_extraordinary_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amazon, "BLOCK_BYTES", 1000)
    lines = [review_line(GOOD), review_line(GOOD, reviewText="long " * 1000), review_line(GOOD)]
    assert "r.json" in refusal(write_lines(tmp_path / "r.json", lines))


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"")
    assert name in refusal(file)
    if name.endswith("gz"):
        write_ratings(file, random_ratings(1))
        file.write_bytes(file.read_bytes()[:-100])
        assert "cannot be read" in refusal(file)


def test_files_that_cannot_be_the_right_one(tmp_path: Path) -> None:
    for name, message in (
        ("reviews_Toys_and_Games_5.json.gz", "got reviews_Toys_and_Games_5.json.gz, expected the category Beauty"),
        ("ratings_Books.csv", "got ratings_Books.csv, expected the category Beauty"),
        ("Beauty.parquet", r"expected one of .json, .json.gz, .csv, .csv.gz"),
    ):
        with pytest.raises(UserError, match=message):
            Amazon(config_of(tmp_path / name, tmp_path))
    for kind, category in amazon.CATEGORIES.items():
        for form in ("reviews_{}_5.json.gz", "reviews_{}.json.gz", "ratings_{}.csv"):
            Amazon(AmazonConfig(kind=kind, source=form.format(category)))


def test_a_missing_file_and_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        prepare(config_of(tmp_path / "reviews_Beauty_5.json.gz", tmp_path))
    assert "No such file" in caught.value.problem
    for words in ("reviews_Beauty_5.json.gz", "ratings_Beauty.csv", "2014 release", "Stanford", "data.source=FILE"):
        assert words in caught.value.remedy
    assert not (tmp_path / "data").exists()


def test_without_network_the_way_out_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"127.0.0.1:9/reviews_Beauty_5.json.gz cannot be fetched \(URLError") as caught:
        Amazon(config_of(None, tmp_path), UNREACHABLE).fingerprint()
    assert "data.source=FILE" in caught.value.remedy
    assert list((tmp_path / "data" / "downloads").iterdir()) == []


class Server(ThreadingHTTPServer):
    """Serves one file and counts."""

    content = b""
    announced = 0
    asked = 0


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        server: Server

        def do_GET(self) -> None:
            self.server.asked += 1
            self.send_response(200 if self.path.endswith("reviews_Beauty_5.json.gz") else 404)
            self.send_header("Content-Length", str(self.server.announced or len(self.server.content)))
            self.end_headers()
            self.wfile.write(self.server.content)

        def log_message(self, *arguments: object) -> None:
            """Keep the test's output clean."""

    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def address(server: Server, name: str = "reviews_Beauty_5.json.gz") -> str:
    return f"http://127.0.0.1:{server.server_port}/{name}"


@pytest.mark.slow
def test_an_address_is_fetched_once(tmp_path: Path, server: Server) -> None:
    ratings = walks()
    file = write_ratings(tmp_path / "r.json.gz", ratings)
    server.content = file.read_bytes()
    first = prepare(config_of(address(server), tmp_path))
    assert first.num_events == len(ratings) and first.sources == {"reviews_Beauty_5.json.gz": file_hash(file)}
    assert prepare(config_of(address(server), tmp_path)) == first and server.asked == 1
    # the same file given by hand is the same data set
    by_hand = file.rename(tmp_path / "reviews_Beauty_5.json.gz")
    before = (tmp_path / "data" / "set" / "dataset.json").stat().st_mtime_ns
    assert prepare(config_of(by_hand, tmp_path)) == first
    assert (tmp_path / "data" / "set" / "dataset.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_half_a_download_is_no_download(tmp_path: Path, server: Server) -> None:
    server.content, server.announced = b"half", 8
    with pytest.raises(UserError, match=r"cannot be fetched \(OSError: got 4 of 8 bytes\)"):
        prepare(config_of(address(server), tmp_path))
    with pytest.raises(UserError, match=r"HTTP Error 404"):
        prepare(config_of(address(server, "gone.csv"), tmp_path))
    assert list((tmp_path / "data").rglob("*")) == [tmp_path / "data" / "downloads"]


@pytest.mark.slow
def test_a_page_instead_of_the_file_is_not_kept(tmp_path: Path, server: Server) -> None:
    server.content = b"<html>Please log in</html>"
    with pytest.raises(UserError, match=r"reviews_Beauty_5.json.gz line 1: JSON parse error: Invalid value"):
        prepare(config_of(address(server), tmp_path))
    assert not (tmp_path / "data" / "set").exists()
    server.content = "".join(f"{review_line(r)}\n" for r in walks()).encode()
    assert prepare(config_of(address(server), tmp_path)).num_events == len(walks())


def test_a_bad_file_leaves_the_old_data_set_alone(tmp_path: Path) -> None:
    file = write_ratings(tmp_path / "ratings_Beauty.csv", walks())
    first = prepare(config_of(file, tmp_path))
    file.write_text(file.read_text() + "half a li")
    with pytest.raises(UserError, match=rf"ratings_Beauty.csv line {len(walks()) + 1}: "):
        prepare(config_of(file, tmp_path))
    assert SequenceDataset.open(tmp_path / "data" / "set").manifest == first
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["set"]


def train_experiment(*overrides: str) -> list[str]:
    said: list[str] = []
    train(compose(["experiment=amazon_beauty_hstu", *overrides]), said.append)
    return said


@pytest.mark.distributed
def test_the_experiment_learns(tmp_path: Path) -> None:
    prepare(config_of(write_ratings(tmp_path / NAMES[0], walks()), tmp_path))
    overrides = [f"data.path={tmp_path}/data/set", f"output={tmp_path}/runs", "nproc=1", "model.num_layers=2"]
    trainer = ["epochs=10", "global_batch_size=16", "evaluation.every_epochs=10", "evaluation.cutoffs=[1,10]"]
    trainer += ["device=cpu", "threads=1", "logging.progress=false", "logging.tensorboard=false"]
    (said,) = run_ranks(1, train_experiment, *overrides, *(f"trainer.{setting}" for setting in trainer))
    result = json.loads((tmp_path / "runs" / "amazon_beauty_hstu" / "result.json").read_text())
    assert said and result["test"]["hr@1"] > 3 * result["popularity"]["hr@1"]
