"""Measured figures: their files, tables and plots; README.md and docs/results.md are rendered from here."""
