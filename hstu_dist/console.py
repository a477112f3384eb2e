"""What a person reads on the terminal: lines of a command, an error as two lines; no torch."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from hstu_dist.errors import UserError


def say(line: str) -> None:
    """A line of the command's result."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def report(error: UserError) -> None:
    """The error and how to mend it, unless another rank of this machine has already said the same."""
    if _said_already(error):
        return
    mend = f"  mend: {error.remedy}\n" if error.remedy else ""
    # one write, so that the lines of two ranks cannot mix
    sys.stderr.write(f"error: {error.problem}\n{mend}")
    sys.stderr.flush()


def _said_already(error: UserError) -> bool:
    """Ranks of one machine raise the same error from the same input, in any order: the first one to come says it.

    torchrun names each rank a file in a folder of its own; their common parent lives as long as this attempt.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return False
    said = Path(error_file).parents[1] / f"said-{hashlib.sha256(str(error).encode()).hexdigest()[:16]}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:
        # saying it twice is better than not at all
        return False
    return False
