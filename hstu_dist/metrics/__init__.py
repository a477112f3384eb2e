"""Ranking metrics that add up exactly across ranks."""
