"""Patches of Megatron-Core: corrections of defects (`fixes.py`) and support for machines without CUDA (`cpu.py`).

Every patch names the upstream line and the test that fails without it.
"""
