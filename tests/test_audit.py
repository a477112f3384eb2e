"""`make audit` against a service of this test's own: what is known fails it, and so does no answer."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[1] / "packaging/audit.py"
WEAK = {"name": "weak", "ecosystem": "PyPI"}
KNOWN = {
    "id": "PYSEC-1",
    "affected": [{"package": WEAK, "ranges": [{"type": "ECOSYSTEM", "events": [{"fixed": "1.1"}]}]}],
}


class _Service(BaseHTTPRequestHandler):
    """OSV's query: knows something of one package."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"vulns": [KNOWN]} if asked["package"]["name"] == "weak" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def service() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Service) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


def audit(packages: Path, names: list[str], port: int) -> subprocess.CompletedProcess[str]:
    for name in names:
        (packages / f"{name}-1.0.dist-info").mkdir()
        (packages / f"{name}-1.0.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    options = ["--path", str(packages), "--osv-url", f"http://127.0.0.1:{port}/v1/query", "--timeout", "5"]
    return subprocess.run([sys.executable, AUDIT, *options], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_what_is_known_fails_it_with_a_line_each(tmp_path: Path, service: int) -> None:
    done = audit(tmp_path, ["sound", "weak"], service)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == "weak 1.0: PYSEC-1, mended in 1.1\n2 packages looked up, 1 vulnerabilities known\n"


@pytest.mark.slow
def test_nothing_known_is_success(tmp_path: Path, service: int) -> None:
    done = audit(tmp_path, ["sound"], service)
    assert (done.returncode, done.stdout) == (0, "1 packages looked up, 0 vulnerabilities known\n")


@pytest.mark.slow
def test_no_answer_is_one_line_and_not_success(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        done = audit(tmp_path, ["sound"], nobody.getsockname()[1])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("audit: no answer from the vulnerability service, nothing was looked up: ")
    assert done.stderr.count("\n") == 1
