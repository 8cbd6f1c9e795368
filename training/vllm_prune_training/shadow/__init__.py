"""ShadowLLM (arXiv 2406.16635): criteria from gradients, the predictor of them, and the run that makes a folder."""
