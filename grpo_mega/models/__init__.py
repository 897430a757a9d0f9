"""Facts about a model: its `config.json`, its parameter tables, layout rules, KV-cache sizes, tensor digests.

Imports neither Megatron nor an engine, and holds no weights. Start reading at `spec.py` (what a model is), then
`parameter_tables.py` (how each Megatron parameter is made of Hugging Face tensors).
"""
