"""Files of an event log, wherever they lie: local paths, or URLs of any file system that Arrow knows (s3, gs, hdfs)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow import fs

from hstu_dist.data.schema import file_hash
from hstu_dist.errors import UserError

CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
PARQUET_SUFFIXES = (".parquet",)
_URL = re.compile(r"^[a-z][a-z0-9+.-]+://")
_WILDCARDS = re.compile(r"[*?\[]")
_LISTING = "data.input"


@dataclass(frozen=True, kw_only=True)
class LogFile:
    """One file as it was when it was listed.

    Attributes:
        shown: path or URL, for messages.
        path: within the file system.
        size: bytes.
        modified: nanoseconds since 1970.
        filesystem: that has it.
    """

    shown: str
    path: str
    size: int
    modified: int
    filesystem: fs.FileSystem = field(repr=False, compare=False)

    @property
    def is_parquet(self) -> bool:
        """Or else comma- or tab-separated text."""
        return self.path.lower().endswith(PARQUET_SUFFIXES)

    @property
    def is_local(self) -> bool:
        """On a mounted disk."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def fingerprint(self) -> str:
        """Hash of the content; of a remote file, which would have to be fetched for that, its size and time."""
        return file_hash(Path(self.path)) if self.is_local else f"size and time:{self.size} {self.modified}"

    def check_unchanged(self) -> None:
        """Compare with what was listed.

        Raises:
            UserError: it has grown, was rewritten or is gone.
        """
        try:
            now = self.filesystem.get_file_info(self.path)
        except OSError as error:
            raise unreadable(self.shown, error) from error
        if now.type != fs.FileType.File:
            raise UserError(f"{self.shown}: vanished while it was read", "prepare again when the log is complete")
        if (now.size, now.mtime_ns) != (self.size, self.modified):
            raise UserError(
                f"{self.shown}: changed while it was read (from {self.size} to {now.size} bytes)",
                "prepare again when nobody writes to the log any more",
            )


def find_files(pattern: str) -> list[LogFile]:
    """Files that a path, folder, glob or URL names, in order of their paths.

    A folder is searched recursively for files of a known format; files and folders whose names start with a dot or an
    underscore are passed over: logs of a table, attempts that were never committed. So they are in a glob, unless it
    has such a name itself; `**` stands for any number of folders. In a URL what follows `?` are options of the file
    system, such as `endpoint_override`.

    Raises:
        UserError: nothing is there, it cannot be listed, or a file is of no known format.
    """
    prefix, filesystem, path = _resolve(pattern)
    try:
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.File:
            found = [info]
        elif info.type == fs.FileType.Directory:
            listed = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
            found = [entry for entry in listed if entry.type == fs.FileType.File and _is_log(path, entry.path)]
        else:
            found = _glob(filesystem, path)
    except OSError as error:
        raise unreadable(pattern, error) from error
    if not found:
        kind = "folder without CSV or Parquet files" if info.type == fs.FileType.Directory else "no such file"
        raise UserError(f"{_LISTING}: got {pattern}: {kind}", "pass data.input=FILE (a CSV or Parquet file, ...)")
    files = [
        LogFile(
            shown=prefix + entry.path, path=entry.path, size=entry.size, modified=entry.mtime_ns, filesystem=filesystem
        )
        for entry in sorted(found, key=lambda entry: Path(entry.path))
    ]
    _check_formats(files)
    return files


def names_of(files: Sequence[LogFile]) -> list[str]:
    """Paths relative to the folder that all files have in common."""
    base = os.path.commonpath([os.path.dirname(file.path) for file in files])
    return [os.path.relpath(file.path, base) for file in files]


def fingerprints(files: Sequence[LogFile]) -> dict[str, str]:
    """Fingerprint of every file by its name, in order.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        return {name: file.fingerprint() for name, file in zip(names_of(files), files, strict=True)}
    except OSError as error:
        raise UserError(f"{_LISTING}: cannot be read ({error})", "check the file and its permissions") from error


def is_hash(fingerprint: str) -> bool:
    """Whether files of equal fingerprints have equal content."""
    return fingerprint.startswith("sha256:")


def unreadable(shown: str, error: Exception) -> UserError:
    """What went wrong with a file or folder, as far as its file system tells."""
    reason = " ".join(str(error).split())[:300]
    return UserError(
        f"{_LISTING}: got {shown}: cannot be read ({reason})",
        "check that it exists and that you may read it; credentials and region of a bucket come from the environment",
    )


def _resolve(pattern: str) -> tuple[str, fs.FileSystem, str]:
    """What messages put before a path, the file system, and the path within it."""
    if not _URL.match(pattern):
        return "", fs.LocalFileSystem(), os.path.normpath(pattern)
    location, _, options = pattern.partition("?")
    # Arrow refuses wildcards in a URL
    whole = re.split(_WILDCARDS, location)[0]
    base = whole if whole == location else whole.rpartition("/")[0]
    try:
        filesystem, path = fs.FileSystem.from_uri(base + (f"?{options}" if options else ""))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(pattern, error) from error
    return f"{location.split('://')[0]}://", filesystem, path + location[len(base) :]


def _glob(filesystem: fs.FileSystem, path: str) -> list[fs.FileInfo]:
    wildcard = _WILDCARDS.search(path)
    if wildcard is None:
        return []
    if "/" not in path[: wildcard.start()]:
        # it finds nothing without a folder to begin with
        path = f"./{path}"
    matched = filesystem.get_file_info(list(ArrowFSWrapper(filesystem).glob(path)))
    base = re.split(_WILDCARDS, path)[0].rpartition("/")[0] or "/"
    # as in a shell, whoever wants them names them
    wanted = _is_hidden(base, path)
    return [
        entry for entry in matched if entry.type == fs.FileType.File and (wanted or not _is_hidden(base, entry.path))
    ]


def _is_log(folder: str, path: str) -> bool:
    return _known(path) and not _is_hidden(folder, path)


def _is_hidden(folder: str, path: str) -> bool:
    return is_hidden(os.path.relpath(path, folder))


def is_hidden(path: str) -> bool:
    """Whether a file is no part of a log: what is being written, and marks of other programs."""
    return any(part.startswith((".", "_")) and part != ".." for part in path.split("/"))


def _known(path: str) -> bool:
    return path.lower().endswith(CSV_SUFFIXES + PARQUET_SUFFIXES)


def _check_formats(files: Sequence[LogFile]) -> None:
    for file in files:
        if not _known(file.path):
            raise UserError(
                f"{_LISTING}: got {file.shown}, expected one of {', '.join(CSV_SUFFIXES + PARQUET_SUFFIXES)}",
                "convert or rename the file",
            )
        if file.is_parquet != files[0].is_parquet:
            raise UserError(f"{file.shown}: got another format than {files[0].shown}", "pass files of one format")
