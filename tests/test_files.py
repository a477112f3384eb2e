"""A file is the old one or the new one, whatever happens while it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from hstu_dist.files import LineFile, write_atomically


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, b"whole")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"half")
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


def test_everybody_may_read_it(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_a_full_disk_keeps_lines_waiting(tmp_path: Path) -> None:
    class Disk:
        """Takes so many bytes, then none."""

        def __init__(self) -> None:
            self.space, self.content = 9, b""

        def write(self, content: bytes) -> int:
            if not self.space:
                raise OSError(28, "No space left on device")
            taken = content[: self.space]
            self.space -= len(taken)
            self.content += taken
            return len(taken)

    lines, disk = LineFile(tmp_path / "lines"), Disk()
    lines.close()
    lines._file = disk  # type: ignore[assignment]
    for text in ("first", "second", "third"):
        lines.add(text)
    assert disk.content == b"first\nsec"
    disk.space = 1000
    lines.add("fourth")
    assert disk.content == b"first\nsecond\nthird\nfourth\n"


def test_lines_are_added(tmp_path: Path) -> None:
    for text in ("one", "two"):
        lines = LineFile(tmp_path / "lines")
        lines.add(text)
        lines.close()
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"
