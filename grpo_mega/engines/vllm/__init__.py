"""What drives vLLM, behind vllm_engine.py."""
