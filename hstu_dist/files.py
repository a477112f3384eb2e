"""Files that a crash leaves whole: replaced in one step, and on disk before anything refers to them."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces `path` in one step when the block ends, and leaves nothing if it fails.

    A reader sees the old file or the new one, never a part. The folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file in one step, as `replacing`."""
    with replacing(path) as file:
        file.write(content)


def sync(path: Path) -> None:
    """Puts a file's content, or a folder's list of entries, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that no more can be written."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LineFile:
    """A file that lines are added to; what a full disk refuses waits in memory for the next line."""

    def __init__(self, path: Path) -> None:
        """Adds to `path`, which is created if it is not there."""
        # unbuffered: a buffer would raise again, and lose or repeat a part, whenever it is flushed
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def add(self, line: str) -> None:
        """Writes a line, after those that are waiting."""
        self._waiting += line.encode() + b"\n"
        with suppress(OSError):
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        """Closes the file; lines that still wait are lost."""
        self._file.close()
