"""Sequence encoders and the recommender around them."""
