"""Errors that a user reads as one line instead of a stack trace, and the exit codes that tell them apart."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a process of a run ends; 128 + number of the signal when a signal stopped it."""

    FINISHED = 0
    FAILED = 1
    BAD_INPUT = 2
    PEER_LOST = 3
    STOPPED = 75
    """Asked by a file to save and stop; sysexits.h calls it a temporary failure, and schedulers may start it again."""


class UserError(Exception):
    """Bad input, configuration or environment: says what was got and how to mend it.

    Args:
        problem: what was got and what was expected, in one sentence.
        remedy: what to do about it, in one sentence; may be empty.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = " ".join(problem.split())
        self.remedy = " ".join(remedy.split())
        super().__init__(f"{self.problem} -> {self.remedy}" if self.remedy else self.problem)

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str]]:
        # worker processes and threads hand errors on by pickling them
        return (type(self), (self.problem, self.remedy))


class PeerLostError(Exception):
    """Another rank is gone or unreachable: this rank is not the cause, and says so instead of a stack trace."""
