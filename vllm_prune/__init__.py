"""vllm-prune: learned context eviction inside an unmodified vLLM. Importing this package imports neither vLLM nor torch."""

__version__ = "0.1.0"
