"""Scoring and retrieval with a trained model: M-FALCON, caches of histories, export and serving."""
