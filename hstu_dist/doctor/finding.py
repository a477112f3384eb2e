"""One line of the doctor's report; no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from hstu_dist.errors import UserError


class Status(StrEnum):
    """How bad it is; only FAIL keeps a run from working."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What was looked at and what was found.

    Attributes:
        name: what was looked at.
        status: how bad it is.
        found: what was found.
        remedy: how to mend it; empty if there is nothing to mend.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""

    def lines(self) -> str:
        """As a person reads it."""
        mend = f"\n      mend: {self.remedy}" if self.remedy else ""
        return f"{self.status:<5} {self.name}: {self.found}{mend}"


def ok(name: str, found: str) -> Finding:
    """Nothing to mend."""
    return Finding(name, Status.OK, found)


def warn(name: str, found: str, remedy: str) -> Finding:
    """Works, but not as it should."""
    return Finding(name, Status.WARN, found, remedy)


def fail(name: str, found: str, remedy: str) -> Finding:
    """A run cannot work."""
    return Finding(name, Status.FAIL, found, remedy)


def guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """What a check finds, or why it could not look: a doctor does not die of what the patient has."""
    try:
        return check()
    except UserError as error:
        return fail(name, error.problem, error.remedy)
    except Exception as error:  # whatever a broken installation raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return fail(name, f"{type(error).__name__}: {reason[0]}", "install the packages of this project anew")


def in_turn(checks: dict[str, Callable[[], Finding]]) -> Iterator[Finding]:
    """All checks, none of which ends the report."""
    for name, check in checks.items():
        yield guarded(name, check)
