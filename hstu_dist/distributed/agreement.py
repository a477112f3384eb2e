"""Whether the machines of a run agree: the same code and libraries, and one run folder that all of them see."""

from __future__ import annotations

import hashlib
import secrets
import socket
import time
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

import hstu_dist
from hstu_dist.distributed.process_group import World
from hstu_dist.errors import UserError

_VISIBLE_SECONDS = 10.0
"""Network file systems may show a new file late."""


def check_machines_agree(world: World, folder: Path) -> None:
    """Compares the machines of a run; every rank calls it. A run on one machine has nothing to compare.

    Args:
        world: this rank among the others.
        folder: the run folder.

    Raises:
        UserError: on every rank alike, it names a rank that differs from rank 0.
    """
    if world.size == world.local_size:
        return
    token = torch.tensor([secrets.randbits(62)], device=world.device)
    dist.broadcast(token, src=0)
    probe = folder / f".shared-{int(token):x}"
    if world.is_main:
        probe.touch()
    dist.barrier()
    mine = torch.tensor([code_fingerprint(), int(_appears(probe))], device=world.device)
    everyone = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(everyone, mine)
    if world.is_main:
        probe.unlink(missing_ok=True)
    for rank, (code, sees) in enumerate(row.tolist() for row in everyone):
        # before the code: another version may lie in another folder
        if not sees:
            raise UserError(
                f"run folder {folder}: rank {rank} does not see what rank 0 wrote there",
                "set output=FOLDER to a folder that all machines share",
            )
        if code != int(everyone[0][0]):
            raise UserError(
                f"rank {rank} runs another version of this package or of torch than rank 0 "
                f"(on {socket.gethostname()}: {hstu_dist.__version__}, torch {torch.__version__})",
                "install the same versions on all machines",
            )


def code_fingerprint() -> int:
    """62 bits that tell versions apart: of this package's sources, torch and TorchRec."""
    package = Path(hstu_dist.__file__).parent
    digest = hashlib.sha256(f"{torch.__version__} {metadata.version('torchrec')}".encode())
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\n".encode())
        digest.update(file.read_bytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 2


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
