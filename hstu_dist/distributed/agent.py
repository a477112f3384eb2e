"""torchrun's agent with one readable line for a failure: `python -m hstu_dist.distributed.agent TORCHRUN_ARGUMENTS`."""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

from hstu_dist.console import report
from hstu_dist.errors import ExitCode, UserError


def main(arguments: Sequence[str]) -> int:
    """Starts and watches the ranks of this machine; returns the exit code.

    0: all ranks finished; 2: the first rank to fail had bad input, and has said so; 1: it failed otherwise, or the
    machines did not find each other;
    128 + signal: stopped by it, after the ranks were given the time to save.
    """
    _quiet_torchrun()
    with tempfile.TemporaryDirectory(prefix="hstu_dist-") as log_dir:
        try:
            run(parse_args([f"--log-dir={log_dir}", *arguments]))
        except ChildFailedError as error:
            return explain(error.failures)
        except SignalException as error:
            return 128 + int(error.sigval)
        except RendezvousError as error:
            # the store's own words come first in the chain
            reason = str(error.__cause__ or error).splitlines()[0]
            remedy = "check that the agents of all machines were started, and the network between them"
            report(UserError(f"the agents of the machines did not meet: {reason}", remedy))
            return ExitCode.FAILED
    return ExitCode.FINISHED


def _quiet_torchrun() -> None:
    """Of what torchrun logs about failures and signals, which `main` reports itself, only restarts stay."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
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
    record.msg, record.args = "a rank failed; starting all ranks again (%s of %s restarts left)", (left, allowed)
    return True


def explain(failures: Mapping[int, ProcessFailure]) -> int:
    """Reports the rank that failed first.

    Args:
        failures: rank → how it ended.

    Returns:
        Exit code of the agent.
    """
    rank = root_cause(failures)
    code = failures[rank].exitcode
    if code == ExitCode.BAD_INPUT:
        return code
    how = f"ended with exit code {code}, its messages are above"
    if code == ExitCode.PEER_LOST:
        how = "lost contact with ranks of another machine"
    elif code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ", by hand or because memory ran out"
    report(UserError(f"rank {rank} {how}", "the same command continues from the last checkpoint"))
    return ExitCode.FAILED


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
