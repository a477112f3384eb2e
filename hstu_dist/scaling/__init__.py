"""Scaling laws: the compute of a run in closed form, laws fitted to many runs, and what they predict; no torch."""
