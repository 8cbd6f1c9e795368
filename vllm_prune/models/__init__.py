"""Gated model classes over vLLM's own, and the configuration hook that makes ``vllm serve DIR`` need no flag."""
