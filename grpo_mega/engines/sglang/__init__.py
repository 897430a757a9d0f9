"""What drives SGLang in processes of its own, behind sglang_engine.py."""
