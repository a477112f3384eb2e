"""The commands of `python -m hstu_dist`, one file each."""
