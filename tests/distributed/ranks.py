"""Functions run on several gloo ranks, each a process of its own that is forked in milliseconds.

    def check(path: Path) -> float:          # importable by name; arguments and result picklable
        with process_group("cpu", 60) as world:
            ...

    results = run_ranks(2, check, path)      # one result a rank

The ranks find each other as under torchrun: through a store that the parent holds, named by environment variables.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import coverage
import torch
import torch.distributed as dist

# imported once, in the server that the ranks are forked from; no thread has started there yet
_PRELOAD = ["pytest", "tests.distributed.ranks", "hstu_dist.commands.train", "hstu_dist.commands.evaluate"]
_LOST_PEER = re.compile("by peer|Broken pipe|PeerLostError")
_GRACE_SECONDS = 2.0


class RanksFailedError(AssertionError):
    """What the rank that failed had to say."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls `function(*args)` on `world_size` ranks at once.

    Returns:
        What each rank returned.

    Raises:
        RanksFailedError: a rank raised, died or took longer than `timeout` seconds; shows its stack trace.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    # port 0 lets the system choose one that is free
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    ranks, pipes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
        process = context.Process(target=_work, args=(theirs, {**place, "MASTER_PORT": store.port}, function, args))
        process.start()
        theirs.close()
        ranks.append(process)
        pipes.append(ours)
    try:
        outcomes = _collect(pipes, time.monotonic() + timeout)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    failures = [(rank, reason) for rank, (succeeded, reason) in enumerate(outcomes) if not succeeded]
    if failures:
        # a rank that lost the broken one, or still waits for it, is not the cause
        rank, reason = min(failures, key=lambda f: f[1] is None or _LOST_PEER.search(f[1]) is not None)
        raise RanksFailedError(f"rank {rank} of {world_size}: {reason or 'did not finish in time'}")
    return [result for _, result in outcomes]


def _collect(pipes: list[Connection], deadline: float) -> list[tuple[bool, Any]]:
    """(succeeded, result or stack trace) of each rank; (False, None) for one that said nothing in time."""
    outcomes: list[tuple[bool, Any]] = [(False, None)] * len(pipes)
    waiting = set(pipes)
    while waiting and time.monotonic() < deadline:
        for pipe in wait(waiting, timeout=0.2):
            assert isinstance(pipe, Connection)
            waiting.remove(pipe)
            try:
                outcome = pickle.loads(pipe.recv_bytes())
            except EOFError:
                outcome = (False, "died without a word")
            outcomes[pipes.index(pipe)] = outcome
            if not outcome[0]:
                # the others may wait for this one in vain
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    return outcomes


def _work(pipe: Connection, place: dict[str, int], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {name: str(value) for name, value in place.items()}
    # the store is the parent's, as it is the agent's under torchrun
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    # TorchRec hands out ShardedTensor, which torch wants replaced by DTensor
    warnings.filterwarnings("ignore", message="Please use DTensor", category=FutureWarning)
    try:
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    if (measured := coverage.Coverage.current()) is not None:
        # the parent kills this process as soon as it has its word
        measured.save()
    # not send: it would share a tensor's memory, which goes with this process
    pipe.send_bytes(pickle.dumps(outcome))
