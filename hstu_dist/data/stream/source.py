"""The files of a stream: listed, settled, and read whole, on any file system of pyarrow.fs."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pa_fs

from hstu_dist.errors import UserError


@dataclass(frozen=True, order=True)
class SourceFile:
    """A file as it was listed.

    Attributes:
        path: below the top of the stream, separated by slashes.
        size: bytes.
        mtime_ns: last modification in nanoseconds; an object store's resolution is a second.
    """

    path: str
    size: int
    mtime_ns: int


class GrewError(Exception):
    """A file changed between listing and reading."""


class Source:
    """A folder or bucket prefix.

    Raises:
        UserError: no file system goes by such a URI.
    """

    def __init__(self, path: str) -> None:
        # without the credentials that a URI can carry
        self.path = re.sub(r"//[^/@]*@", "//", path)
        try:
            if "://" in path:
                self._files, self._root = pa_fs.FileSystem.from_uri(path)
            else:
                self._files, self._root = pa_fs.LocalFileSystem(), str(Path(path).absolute())
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"data.path: got {self.path}: {first_line(error)}", "give a folder, or a URI such as s3://bucket/prefix"
            ) from error

    def list(self) -> list[SourceFile]:
        """Every file, also hidden ones, in order of path.

        Raises:
            OSError: it cannot be listed.
        """
        found = []
        for info in self._files.get_file_info(pa_fs.FileSelector(self._root, recursive=True)):
            path = info.path[len(self._root) :].lstrip("/")
            if info.type == pa_fs.FileType.File:
                found.append(SourceFile(path, info.size, info.mtime_ns))
        return sorted(found)

    def probe(self) -> None:
        """Looks at the top alone.

        Raises:
            OSError: it cannot be listed.
        """
        self._files.get_file_info(pa_fs.FileSelector(self._root, recursive=False))

    def read(self, file: SourceFile) -> bytes:
        """The whole content of a file.

        Raises:
            GrewError: it is no longer what was listed.
            OSError: it cannot be read; FileNotFoundError: it is gone.
        """
        path = f"{self._root.rstrip('/')}/{file.path}"
        with self._files.open_input_stream(path, compression=None) as stream:
            content: bytes = stream.read()
        info = self._files.get_file_info(path)
        if len(content) != file.size or (info.size, info.mtime_ns) != (file.size, file.mtime_ns):
            raise GrewError(f"{file.path} had {file.size} bytes and has {info.size}")
        return content


@dataclass
class Settling:
    """Remembers since when each file has looked the way it does.

    Attributes:
        seconds: how long a file must stand still.
    """

    seconds: float
    _since: dict[str, tuple[SourceFile, float]] = field(default_factory=dict, init=False)

    def settled(self, files: list[SourceFile], now: float | None = None) -> list[SourceFile]:
        """Those of a listing that stood still long enough, in the same order; the others are remembered.

        Args:
            files: of the latest listing; files that are not among them are forgotten.
            now: seconds of a monotonic clock; None: of this machine's.
        """
        moment = time.monotonic() if now is None else now
        before, self._since = self._since, {}
        ready = []
        for file in files:
            known, since = before.get(file.path, (file, moment))
            since = since if known == file else moment
            self._since[file.path] = (file, since)
            if moment - since >= self.seconds:
                ready.append(file)
        return ready


def check_reachable(path: str) -> None:
    """Refuses a stream whose folder or bucket cannot be listed now; it may be empty.

    Raises:
        UserError: says why.
    """
    source = Source(path)
    try:
        source.probe()
    except OSError as error:
        raise UserError(
            f"data.path: {source.path} cannot be listed ({first_line(error)})",
            "create the folder or bucket, or correct data.path, network and credentials",
        ) from error


def first_line(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
