"""Attention over lanes: backend, step metadata, the CPU implementation and its naive reference."""
