"""The training loop, its hooks, optimizers and evaluation."""
