"""Facts about a model: its `config.json`, its parameter tables, layout rules, KV-cache sizes, tensor digests.

This package imports neither Megatron nor an engine, and holds no weights. Start reading at `spec.py` (the sizes of a
model), then `parameter_tables.py` (the Hugging Face tensors of each Megatron parameter).
"""
