"""Each rank's file has what the terminal leaves out: messages of all ranks, stack traces, crashes."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hstu_dist.commands.rank_log import rank_log
from tests.train.cases import WORLD


def fails(logger: logging.Logger) -> None:
    logger.info("for the file")
    logger.warning("for both")
    raise ZeroDivisionError("on purpose")


def test_the_file_has_more_than_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # others left handlers behind whose terminals are gone
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logger = logging.getLogger("hstu_dist.somewhere")
    logger.parent.setLevel(logging.WARNING)  # type: ignore[union-attr]
    terminal = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(terminal)
    try:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), rank_log(tmp_path, replace(WORLD, rank=3, size=4)):
                fails(logger)
        logger.info("for nobody")
    finally:
        logging.getLogger().removeHandler(terminal)
        logger.parent.setLevel(logging.NOTSET)  # type: ignore[union-attr]
    assert capsys.readouterr().err.splitlines() == ["for both"] * 2
    text = (tmp_path / "rank-3.log").read_text()
    assert text.count("INFO hstu_dist: rank 3 of 4 starts on cpu") == text.count("for the file") == 2
    assert text.count("Traceback") == 2 and "ZeroDivisionError" in text and "for nobody" not in text


@pytest.mark.slow
def test_a_crash_leaves_its_stack(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
from hstu_dist.commands.rank_log import rank_log
from tests.train.cases import WORLD
def deep_inside():
    os.kill(os.getpid(), signal.SIGSEGV)
with rank_log(Path({str(tmp_path)!r}), WORLD):
    deep_inside()
"""
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False, timeout=120)
    assert done.returncode == -signal.SIGSEGV
    text = (tmp_path / "rank-0.log").read_text()
    assert "Segmentation fault" in text and "deep_inside" in text
