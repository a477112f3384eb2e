"""Amazon reviews of 2014, from the official review or rating file of a category; every line checked.

A review file holds one JSON object a line, a rating file `user,item,rating,timestamp` without a header. Ratings
are read as a stream: the text of the reviews, most of the file, is never held.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json

from hstu_dist.data.config import AmazonConfig
from hstu_dist.data.download import fetch, is_url, name_of
from hstu_dist.data.events import EventTable, Origin
from hstu_dist.data.schema import file_hash
from hstu_dist.errors import UserError

CATEGORIES = {
    "amazon_beauty": "Beauty",
    "amazon_sports": "Sports_and_Outdoors",
    "amazon_toys": "Toys_and_Games",
}
OFFICIAL = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
SUFFIXES = (".json", ".json.gz", ".csv", ".csv.gz")
OFFICIAL_NAME = r"(?:reviews|ratings)_(\w+?)(?:_5)?\.(?:json|csv)(?:\.gz)?"

# the release covers May 1996 to July 2014; later ones have the same fields, so only their dates tell them apart
FIRST_SECOND = int(datetime(1996, 1, 1, tzinfo=UTC).timestamp())
LAST_SECOND = int(datetime(2014, 12, 31, tzinfo=UTC).timestamp())

# a review is parsed whole, and the longest have tens of thousands of characters
BLOCK_BYTES = 4 << 20
LINES_AT_ONCE = 4096


class Amazon:
    """One category as a source of events."""

    def __init__(self, config: AmazonConfig, official: str = OFFICIAL) -> None:
        self.category = CATEGORIES[config.kind]
        name = f"reviews_{self.category}_5.json.gz"
        self.source = config.source or f"{official}/{name}"
        self.remedy = (
            f"download {name} (or ratings_{self.category}.csv) of the Amazon product data, 2014 release, which UC San "
            f"Diego and Stanford publish ({OFFICIAL}/{name}), and pass data.source=FILE"
        )
        # beside the data set, so that its replacement does not remove them
        self.downloads = Path(config.path).resolve().parent / "downloads"
        self._check_name(name_of(self.source))

    def fingerprint(self) -> dict[str, str]:
        """Hash of the file by its name, downloaded first if need be.

        Raises:
            UserError: the file is missing or cannot be fetched.
        """
        file = self._file()
        try:
            return {name_of(self.source): file_hash(file)}
        except OSError as error:
            raise UserError(f"data.source: got {file}: {error.strerror or error}", self.remedy) from error

    def read(self) -> EventTable:
        """Every rating as an event whose action is the number of stars.

        Raises:
            UserError: names the file and line that cannot be used.
        """
        file = self._file()
        try:
            table = self._read(file)
        except UserError:
            # what the address gave is of no use: the next try fetches anew
            if is_url(self.source):
                file.unlink(missing_ok=True)
            raise
        users, items, stars, times = (column.combine_chunks() for column in table.columns)
        return EventTable(
            users=users,
            items=items,
            order_times=times.to_numpy(),
            actions=stars.to_numpy().astype(np.int32),
            origin=Origin(files=(str(file),), starts=(0,)),
        )

    def _check_name(self, name: str) -> None:
        if not name.lower().endswith(SUFFIXES):
            raise UserError(f"data.source: got {self.source}, expected one of {', '.join(SUFFIXES)}", self.remedy)
        official = re.fullmatch(OFFICIAL_NAME, name)
        if official and official[1] != self.category:
            raise UserError(f"data.source: got {name}, expected the category {self.category}", self.remedy)

    def _file(self) -> Path:
        return fetch(self.source, self.downloads, self.remedy) if is_url(self.source) else Path(self.source)

    def _read(self, file: Path) -> pa.Table:
        form = RATINGS if ".csv" in name_of(self.source).lower() else REVIEWS
        try:
            with _plain(file) as stream:
                table, reason = _checked(stream, form)
            if table is None:
                raise UserError(_first_bad_line(file, form) or f"{file}: {reason}", self.remedy)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file}: cannot be read ({error})", self.remedy) from error
        return table


@dataclass(frozen=True, kw_only=True)
class Form:
    """One of the two official formats.

    Attributes:
        columns: user, item, stars and time.
        is_json: one object a line, or comma-separated values.
    """

    columns: tuple[str, str, str, str]
    is_json: bool

    @property
    def schema(self) -> pa.Schema:
        """What the columns are read as."""
        types = (pa.large_string(), pa.large_string(), pa.float64(), pa.int64())
        return pa.schema(list(zip(self.columns, types, strict=True)))


REVIEWS = Form(columns=("reviewerID", "asin", "overall", "unixReviewTime"), is_json=True)
RATINGS = Form(columns=("user", "item", "rating", "timestamp"), is_json=False)


def _checked(stream: pa.NativeFile, form: Form) -> tuple[pa.Table | None, str]:
    """All ratings of a stream, or None and what is wrong with them."""
    try:
        table = _parse(stream, form)
    except pa.ArrowInvalid as error:
        return None, str(error)
    reason = "has no line" if len(table) == 0 else _complaint(table)
    return (None, reason) if reason else (table, "")


def _parse(stream: pa.NativeFile, form: Form) -> pa.Table:
    if form.is_json:
        parse = pa_json.ParseOptions(explicit_schema=form.schema, unexpected_field_behavior="ignore")
        # one thread: read-ahead would hold more of the text
        options = pa_json.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)
        reader = pa_json.open_json(stream, read_options=options, parse_options=parse)
    else:
        reader = pa_csv.open_csv(
            stream,
            read_options=pa_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=form.columns),
            convert_options=pa_csv.ConvertOptions(column_types=form.schema),
        )
    with reader:
        return pa.Table.from_batches(reader, schema=form.schema)


def _complaint(table: pa.Table) -> str:
    """The first column with a value that no official file has, and that value; empty if all are sound."""
    users, items, stars, times = table.columns
    checks = (
        (pc.match_substring_regex(users, r"^[!-~]+$"), "an id"),
        (pc.match_substring_regex(items, r"^[0-9A-Za-z]{10}$"), "an id of 10 letters and digits"),
        (pc.is_in(stars, pa.array([1.0, 2.0, 3.0, 4.0, 5.0])), "1 to 5 stars"),
        (
            pc.and_(pc.greater_equal(times, FIRST_SECOND), pc.less_equal(times, LAST_SECOND)),
            "a second of 1996 to 2014, which this release covers",
        ),
    )
    for name, values, (sound, expected) in zip(table.schema.names, table.columns, checks, strict=True):
        row = pc.index(pc.fill_null(sound, False), False).as_py()
        if row >= 0:
            return f"{name}: got {_shown(values[row])}, expected {expected}"
    return ""


def _shown(value: pa.Scalar) -> str:
    # a text that Arrow took from JSON may be no text
    is_text = value.is_valid and pa.types.is_large_string(value.type)
    return repr(value.as_buffer().to_pybytes().decode(errors="backslashreplace") if is_text else value.as_py())


def _first_bad_line(file: Path, form: Form) -> str:
    """Where the first unusable line is, and why; the same checks on fewer and fewer lines."""
    with gzip.open(file) if _is_gzip(file) else file.open("rb") as lines:
        first = 1
        while chunk := list(islice(lines, LINES_AT_ONCE)):
            if _reason(b"".join(chunk), form):
                for number, line in enumerate(chunk, start=first):
                    if reason := _reason(line, form):
                        return f"{file} line {number}: {_hint(line, form)}{reason}"
            first += len(chunk)
    return ""


def _reason(content: bytes, form: Form) -> str:
    if not content.strip():
        return ""
    reason = _checked(pa.BufferReader(content), form)[1]
    return re.sub(r" in row \d+$", "", reason)


def _hint(line: bytes, form: Form) -> str:
    is_literal = form.is_json and re.match(rb"\s*\{\s*u?'", line)
    return "is a Python literal, expected strict JSON; " if is_literal else ""


def _is_gzip(file: Path) -> bool:
    """By content: browsers unpack files and keep their names."""
    with file.open("rb") as handle:
        return handle.read(2) == b"\x1f\x8b"


@contextmanager
def _plain(file: Path) -> Iterator[pa.NativeFile]:
    with pa.input_stream(file, compression="gzip" if _is_gzip(file) else None) as stream:
        yield stream
