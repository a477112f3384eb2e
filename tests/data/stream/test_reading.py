"""Files that can be read, and every way in which one cannot."""

from __future__ import annotations

import gzip
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu_dist.data.stream.keys import item_ids, text_words, user_keys
from hstu_dist.data.stream.reading import Reader
from hstu_dist.errors import UserError
from tests.data.stream.cases import NUM_ITEMS, START, config_of

NOW = START + 10_000.0
GOOD: dict[str, Any] = {
    "user_id": [3, 1, 3],
    "item_id": [5, 6, 7],
    "timestamp": [START, START + 1, START + 2],
    "action": [1, 0, 2],
}


def parquet(**changed: Any) -> bytes:
    columns = {name: values for name, values in (GOOD | changed).items() if values is not None}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, write_page_checksum=True)
    return sink.getvalue()


def damaged() -> bytes:
    content = bytearray(parquet(**{name: values * 1000 for name, values in GOOD.items()}))
    content[4:60] = b"\xff" * 56
    return bytes(content)


CSV = b"user_id,item_id,timestamp,action\n3,5,%d,1\n1,6,%d,0\n3,7,%d,2\n" % (START, START + 1, START + 2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", parquet()),
        ("a.csv", CSV),
        ("b/A.CSV.GZ", gzip.compress(CSV, mtime=0)),
        ("a.tsv", CSV.replace(b",", b"\t")),
        ("a.parquet", parquet(new_column=["x", "y", "z"])),
        ("a.parquet", parquet(timestamp=pa.array([str(s) for s in GOOD["timestamp"]], pa.string_view()))),
        ("a.parquet", parquet(timestamp=pa.array([s * 1000 for s in GOOD["timestamp"]], pa.timestamp("ms")))),
    ],
)
def test_every_format_gives_the_same_events(name: str, content: bytes) -> None:
    events = Reader(config_of("x")).read(name, content, NOW)
    assert events.users.tolist() == GOOD["user_id"] and events.items.tolist() == GOOD["item_id"]
    assert events.seconds.tolist() == GOOD["timestamp"] and events.actions.tolist() == GOOD["action"]


def test_events_are_ordered_by_time_to_the_last_digit_ties_as_they_came() -> None:
    times = [START * 1000 + ms for ms in (900, 100, 500, 100)]
    content = parquet(user_id=[0] * 4, item_id=[1, 2, 3, 4], timestamp=times, action=[0] * 4)
    events = Reader(config_of("x", timestamp_unit="ms")).read("a.parquet", content, NOW)
    assert events.items.tolist() == [2, 4, 3, 1] and set(events.seconds.tolist()) == {START}


BAD: list[tuple[str, bytes, str]] = [
    ("a.parquet", b"", "is empty"),
    ("a.parquet", b"PAR1 this is not Parquet PAR1", "cannot be read"),
    ("a.parquet", parquet()[:-20], "cannot be read"),
    ("a.parquet", damaged(), "cannot be read"),
    ("a.csv.gz", CSV, "cannot be read"),
    ("a.csv.gz", gzip.compress(CSV, mtime=0)[:-9], "cannot be read"),
    # after the header, a block of the type that deflate has not
    ("a.csv.gz", gzip.compress(CSV, mtime=0)[:10] + b"\xff" * 9, "cannot be read .*invalid block type"),
    ("a.parquet", parquet().replace(b"user_id", b"\xffser_id"), "cannot be read .*codec can't decode"),
    ("a.csv", CSV + b"1,2\n", "cannot be read"),
    ("a.parquet", parquet(item_id=None), "column 'item_id' is missing, the file has user_id, timestamp, action"),
    ("a.csv", CSV.replace(b"action", b"item_id"), "column 'item_id' is there more than once"),
    ("a.parquet", parquet(user_id=[1, None, 2]), "row 2: column 'user_id': got None"),
    ("a.parquet", parquet(item_id=[1.5, 2.0, 3.0]), "row 1: column 'item_id': got 1.5"),
    ("a.parquet", parquet(item_id=[1, NUM_ITEMS, 2]), rf"row 2: got item {NUM_ITEMS}, expected one in \[0, 50\)"),
    ("a.parquet", parquet(item_id=["a", "b", "c"]), "got items of type large_string"),
    ("a.parquet", parquet(timestamp=[START, -1, START]), "row 2: column 'timestamp': got -1"),
    ("a.parquet", parquet(timestamp=[START, START + 10**6, START]), "row 2: .* s ahead of this machine's clock"),
    ("a.parquet", parquet(timestamp=[START * 1000] * 3), "ahead of this machine's clock"),
    ("a.parquet", parquet(timestamp=pa.array([1, -1, 1], pa.timestamp("ns"))), r"got -1 as timestamp\[ns\]"),
    ("a.parquet", parquet(timestamp=pa.array([10**13] * 3, pa.timestamp("s"))), r"got 10{16} as .*'s clock"),
    ("a.parquet", parquet(timestamp=pa.array(["soon"] * 3, pa.string_view())), "'timestamp': got type large_string"),
    ("a.parquet", parquet(action=[0, -3, 0]), r"row 2: column 'action': got -3"),
    ("a.parquet", parquet(user_id=[[1], [2], [3]]), "column 'user_id': got type"),
    ("a.parquet", parquet(user_id=["x", "y", "z"]), "column 'user_id' has text, expected integers as in earlier files"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files_say_why(name: str, content: bytes, message: str) -> None:
    reader = Reader(config_of("x"))
    reader.read("good.parquet", parquet(), NOW)
    with pytest.raises(UserError, match=message):
        reader.read(name, content, NOW)
    assert len(reader.read("good.parquet", parquet(), NOW)) == 3


def test_a_bad_first_file_does_not_decide_types() -> None:
    reader = Reader(config_of("x", item_ids="hashed"))
    with pytest.raises(UserError):
        reader.read("a.parquet", parquet(user_id=["x", "y", "z"], action=[-1, 0, 0]), NOW)
    assert len(reader.read("good.parquet", parquet(), NOW)) == 3


def test_text_ids_of_csv_need_not_look_like_text_in_every_file() -> None:
    reader = Reader(config_of("x", item_ids="raw"))
    numbers = CSV.splitlines()[0] + b"\n7,1556343108,%d,0\n" % START
    # all integers, first or later, and among texts
    first = reader.read("a.csv", numbers, NOW)
    # nor like numbers, which these are not
    short = reader.read("d.csv", numbers + b"12e3,3.0,%d,0\n1234e567,%d,%d,0\n" % (START, 2**63 + 1, START), NOW)
    named = reader.read("e.csv", numbers + b"12e3,3.0,%d,0\nguest,a,%d,0\n" % (START, START), NOW)
    assert (short.users[1], short.items[1]) == (named.users[1], named.items[1]) and 12000 not in short.users
    mixed = reader.read("b.csv", numbers + b"u7,B000123456,%d,0\n7,0439893577,%d,0\n" % (START, START), NOW)
    later = reader.read("c.csv", numbers, NOW)
    assert first.items[0] == mixed.items[0] == later.items[0] == 1556343108 and len(set(mixed.items.tolist())) == 3
    assert mixed.users.tolist()[::2] == [7, 7] and mixed.users[1] != 7


def test_a_byte_order_mark_is_no_part_of_a_name() -> None:
    read = Reader(config_of("x")).read("a.csv", b"\xef\xbb\xbf" + CSV.replace(b"\n", b"\r\n"), NOW)
    assert len(read) == len(Reader(config_of("x")).read("a.csv", CSV, NOW)) > 0


def test_an_integer_is_the_same_id_as_text() -> None:
    limits = np.iinfo(np.int64)
    numbers = [0, 5, -5, 10**17, 10**18 - 1, 10**18, -(10**17), -(10**18), limits.max, limits.min, limits.max - 1]
    texts = pa.array(
        [*map(str, numbers), str(limits.max + 1), str(limits.min - 1), "007", "-0", "+5"], pa.large_string()
    )
    keys = user_keys(texts).tolist()
    assert keys[: len(numbers)] == numbers and not set(keys[len(numbers) :]) & {7, 0, 5}


def test_a_file_without_rows_is_no_error() -> None:
    assert len(Reader(config_of("x")).read("a.csv", b"user_id,item_id,timestamp,action\n", NOW)) == 0


def test_texts_are_told_apart_wherever_they_lie() -> None:
    texts = ["a", "b", "ab", "ba", "aab", "é", "x" * 1000, "x" * 1001, "a\0", "\0a", *(f"{n}." for n in range(5000))]
    words = text_words(pa.array(texts, pa.large_string()))
    assert len(set(words.tolist())) == len(texts)
    # of a slice, and through a dictionary, as alone
    assert text_words(pa.array(texts, pa.large_string())[3:5]).tolist() == words[3:5].tolist()
    repeated = pa.array(texts[::-1] * 2, pa.large_string())
    assert user_keys(repeated).view(np.uint64).tolist() == words[::-1].tolist() * 2


@pytest.mark.parametrize("ids", [pa.array(range(20_000)), pa.array([f"item-{n}" for n in range(20_000)])])
def test_hashed_items_share_rows_as_often_as_stated(ids: pa.Array) -> None:
    ids = ids if pa.types.is_integer(ids.type) else ids.cast(pa.large_string())
    num_items = 200_000
    rows = item_ids(ids, num_items, "hashed")
    assert rows.min() >= 0 and rows.max() < num_items
    _, place, count = np.unique(rows, return_inverse=True, return_counts=True)
    shared = (count[place] > 1).mean()
    assert shared == pytest.approx(1 - (1 - 1 / num_items) ** 19_999, rel=0.1)
