"""docs/tutorial.md, walked through in an empty folder: every command as it stands there, but for the port."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.docs.pages import DOCS, shell_blocks

PAGE = (DOCS / "tutorial.md").read_text()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_tutorial_leads_from_a_log_to_answers(tmp_path: Path) -> None:
    script = "\n".join(["set -euo pipefail", *shell_blocks(PAGE)]).replace("8000", str(free_port()))
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=1100
    )
    assert done.returncode == 0, done.stdout + done.stderr

    said = re.search(r"^    (data/clicks: .*)$", PAGE, re.MULTILINE)
    assert said and said[1] in done.stdout
    result = json.loads((tmp_path / "runs/clicks/result.json").read_text())
    # seven of ten clicks stay on their shelf, and popularity knows nothing of shelves
    assert result["test"]["hr@10"] > 0.4 > 5 * result["popularity"]["hr@10"]
    written = set(re.findall(r"^\| `([^`]+)`(?:, `([^`]+)`)? \|", PAGE, re.MULTILINE))
    for name in {name for pair in written for name in pair if name}:
        assert list((tmp_path / "runs/clicks").glob(re.sub(r"-N\b", "-*", name.rstrip("/")))), name

    first, second = pq.read_table(tmp_path / "scores.parquet")["scores"].to_pylist()
    assert first[0] > first[2] and second[0] > second[2]
    best = pq.read_table(tmp_path / "best.parquet")["retrieved"].to_pylist()
    assert 124 in best[0]
    assert json.dumps(best[0]).replace(" ", "") in done.stdout.replace(" ", "")
