"""Starts the ranks of a run on a cluster, from a machine that need not have torch."""
