"""Checks of command-line options that several benchmarks share."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An option's value as a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number >= 1")
    return int(text)
