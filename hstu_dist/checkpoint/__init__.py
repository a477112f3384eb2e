"""Saving and restoring a run: atomic, complete, newest whole checkpoint wins."""
