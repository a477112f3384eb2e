"""hstu_dist: distributed training of HSTU generative recommenders (arXiv 2402.17152)."""

__version__ = "0.1.0"
