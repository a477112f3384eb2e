"""Measurements that several ranks make together: a worker module under torchrun, asked and answering in JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.environment import ROOT
from hstu_dist.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def ask_ranks(worker: str, ranks: int, request: DataclassInstance, remedy: str) -> dict[str, Any]:
    """What rank 0 of a worker answers.

    Args:
        worker: module, started as `python -m WORKER REQUEST.json ANSWER.json` on every rank.
        ranks: how many, on this machine.
        request: dataclass of plain values.
        remedy: for the user, if the ranks fail.

    Raises:
        UserError: the ranks ended without an answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(asdict(request)))
        agent = [sys.executable, "-m", "hstu_dist.distributed.agent", "--standalone", f"--nproc-per-node={ranks}"]
        status = subprocess.run([*agent, "-m", worker, str(asked), str(answered)], cwd=ROOT, check=False).returncode
        if status or not answered.exists():
            raise UserError(f"{worker} on {ranks} ranks: ended with exit code {status}", remedy)
        answer: dict[str, Any] = json.loads(answered.read_text())
    return answer
