"""Measurements of hstu_dist: `python -m benchmarks NAME` times contenders and writes one result file."""
