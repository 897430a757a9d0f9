"""Imported last by the fork server of ranks.py: hides the objects of all imports from the garbage collector.

Without this each rank examines the million objects of torch and Megatron in every collection, and copies their memory,
which it shares with the fork server.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
