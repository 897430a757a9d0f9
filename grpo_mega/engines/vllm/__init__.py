"""The vLLM engine: vLLM inside the training processes."""
