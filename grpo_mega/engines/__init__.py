"""Inference engines; the only importers of vLLM and SGLang."""
