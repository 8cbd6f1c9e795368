"""Evaluation of a gated checkpoint through the live engine: real eviction, chunked prefill, measured memory."""
