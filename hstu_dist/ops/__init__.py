"""Jagged operations: attention with interchangeable backends, relative bias, stateless random numbers."""
