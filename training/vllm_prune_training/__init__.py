"""Training code of vllm-prune: corpus, recall tasks, packing, and the reference base model."""
