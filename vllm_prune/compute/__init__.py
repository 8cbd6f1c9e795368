"""Computation on some rows of a weight matrix: compiled loops over the rows as they lie, nothing is copied."""
