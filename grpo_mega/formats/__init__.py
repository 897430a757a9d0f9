"""Checkpoint files on disk: safetensors, torch_dist, Megatron's keys and arguments, and planned output files.

Reads and writes bytes at known places. Knows no model family and builds no model. Start reading at
`planned_files.py` (what a file will contain) and `safetensors_reader.py` (how one is read).
"""
