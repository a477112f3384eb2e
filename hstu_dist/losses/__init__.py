"""Training objectives over unit vectors: sampled and full softmax."""
