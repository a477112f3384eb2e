"""What a person reads on the terminal: lines of a command, an error as two lines; no torch."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from hstu_dist.errors import UserError
from hstu_dist.files import write_atomically


def say(line: str) -> None:
    """A line of the command's result."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def report(error: UserError) -> None:
    """The error and how to mend it, unless another rank of this machine has already said the same."""
    if _said_already(str(error)):
        return
    mend = f"  mend: {error.remedy}\n" if error.remedy else ""
    # one write, so that the lines of two ranks cannot mix
    sys.stderr.write(f"error: {error.problem}\n{mend}")
    sys.stderr.flush()


def note(text: str) -> None:
    """A line about something that this rank did not cause, unless another rank of this machine has said it."""
    if not _said_already(text):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def leave_word(text: str) -> None:
    """Hands the agent, if there is one, what it shall say when this rank ends; in the form that torchrun reads."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        told = {"message": text, "extraInfo": {"timestamp": int(time.time()), "py_callstack": ""}}
        write_atomically(Path(error_file), json.dumps({"message": told}).encode())


def _said_already(text: str) -> bool:
    """Ranks of one machine raise the same error from the same input, in any order: the first one to come says it.

    torchrun names each rank a file in a folder of its own; their common parent lives as long as this attempt.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return False
    said = Path(error_file).parents[1] / f"said-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:
        # saying it twice is better than not at all
        return False
    return False
