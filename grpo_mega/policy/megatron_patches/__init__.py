"""Patches of Megatron-Core: defects of the pinned release (`fixes.py`) and what lets it run without CUDA (`cpu.py`).

Every patch names the upstream line and the test that fails without it.
"""
