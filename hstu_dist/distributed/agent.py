"""torchrun's agent with one readable line for a failure: `python -m hstu_dist.distributed.agent TORCHRUN_ARGUMENTS`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
)
from torch.distributed.launcher import api
from torch.distributed.run import parse_args, run

from hstu_dist.console import note, report
from hstu_dist.distributed.local_agent import LocalAgent
from hstu_dist.errors import ExitCode, UserError
from hstu_dist.machine import oom_kills


def main(arguments: Sequence[str]) -> int:
    """Starts and watches the ranks of this machine; returns the exit code.

    0: all ranks finished; 2: the first rank to fail had bad input, and has said so; 1: it failed otherwise, or the
    machines did not find each other; 3: the agent of the first machine, through which all agents meet, has gone;
    128 + signal: stopped by it, after the ranks were given the time to save.
    """
    _quiet_torchrun()
    # the launcher means this agent, not its ranks
    os.environ.pop("TORCH_CPP_LOG_LEVEL", None)
    # agents count restarts each for itself, so that ranks cannot tell by the count which keys of a store that lives on
    # are stale: every attempt gets a new store
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    kills_before = oom_kills()

    def cause(failures: Mapping[int, ProcessFailure]) -> str:
        return describe(failures, out_of_memory=oom_kills() > kills_before)

    # torchrun offers no other way to bring an agent of one's own
    api.LocalElasticAgent = partial(LocalAgent, describe=cause)  # type: ignore[misc, assignment]
    with tempfile.TemporaryDirectory(prefix="hstu_dist-") as log_dir:
        try:
            run(parse_args([f"--log-dir={log_dir}", *arguments]))
        except ChildFailedError as error:
            return explain(error.failures, cause(error.failures))
        except SignalException as error:
            return 128 + int(error.sigval)
        except RendezvousError as error:
            return explain_meeting(error)
    return ExitCode.FINISHED


def _quiet_torchrun() -> None:
    """Of what torchrun logs about failures and signals, which `main` reports itself, only restarts stay."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.rendezvous").setLevel(logging.ERROR)
    agent = logging.getLogger("torch.distributed.elastic.agent.server.api")
    agent.setLevel(logging.INFO)
    agent.addFilter(_only_restarts)


def _only_restarts(record: logging.LogRecord) -> bool:
    if "will restart worker group" not in str(record.msg) or not isinstance(record.args, tuple):
        return False
    if "new nodes" in str(record.msg):
        record.msg, record.args = "another machine starts its ranks again; so does this one", ()
        return True
    _role, _state, left, allowed = record.args
    if isinstance(left, int) and isinstance(allowed, int) and left > allowed:
        record.msg, record.args = "the ranks have saved and stopped; starting them again", ()
        return True
    record.msg, record.args = "a rank failed; starting all ranks again (%s of %s restarts left)", (left, allowed)
    return True


def explain_meeting(error: RendezvousError) -> int:
    """Says why the agents of several machines cannot work together; returns the exit code of this one."""
    if isinstance(error, RendezvousClosedError):
        report(UserError("another machine has ended the run", "its own message says why"))
        return ExitCode.FAILED
    # the store's own words come first in the chain
    reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
    if isinstance(error, RendezvousConnectionError):
        note(f"the first machine's agent is gone or cannot be reached: {reason}")
        return ExitCode.PEER_LOST
    remedy = "check that the agents of all machines were started, and the network between them"
    report(UserError(f"the agents of the machines did not meet: {reason}", remedy))
    return ExitCode.FAILED


def explain(failures: Mapping[int, ProcessFailure], cause: str) -> int:
    """Reports a failure that ends the run on this machine.

    Args:
        failures: rank → how it ended.
        cause: what `describe` says of them.

    Returns:
        Exit code of the agent.
    """
    if failures[root_cause(failures)].exitcode == ExitCode.BAD_INPUT:
        # the rank has said it
        return ExitCode.BAD_INPUT
    report(UserError(cause, "the same command continues from the last checkpoint"))
    return ExitCode.FAILED


def describe(failures: Mapping[int, ProcessFailure], out_of_memory: bool) -> str:
    """How the rank that failed first ended, in one line.

    Args:
        failures: rank → how it ended.
        out_of_memory: whether the kernel has killed a process of this machine for want of memory meanwhile.
    """
    rank = root_cause(failures)
    code = failures[rank].exitcode
    if code == ExitCode.PEER_LOST:
        said = failures[rank].message
        # a plain string if the rank left no word
        what = said.get("message") if isinstance(said, dict) else None
        return f"rank {rank} {what or 'lost contact with ranks of another machine'}"
    if code >= 0:
        return f"rank {rank} ended with exit code {code}, its messages are above"
    how = f"rank {rank} was killed by {signal.Signals(-code).name}"
    if code != -signal.SIGKILL:
        return how
    if out_of_memory:
        return f"{how}: the kernel ended it because memory ran out; use fewer ranks a machine or smaller batches"
    return f"{how}, by hand or because a limit of memory was reached"


def root_cause(failures: Mapping[int, ProcessFailure]) -> int:
    """The rank whose failure brought the others down.

    A rank that lost a peer, or that the agent itself terminated, is a consequence. Times are whole seconds, so
    a signal breaks ties: it kills at once, while an exception takes a moment to end a process.
    """

    def order(rank: int) -> tuple[bool, int, bool]:
        failure = failures[rank]
        consequence = failure.exitcode in (ExitCode.PEER_LOST, -signal.SIGTERM)
        return consequence, failure.timestamp, failure.exitcode >= 0

    return min(failures, key=order)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
