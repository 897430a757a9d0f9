"""When Python looks for reference cycles: rarely while a rank starts, as usual from its first step on.

A start creates some hundred thousand objects that live until the end, most of them by imports. By default Python
examines all of them again and again, which takes a tenth of the CPU time of a start.
Asserted by tests/unit/parallel/test_garbage_collection.py.
"""

from __future__ import annotations

import gc

_USUAL = gc.get_threshold()
_WHILE_STARTING = (100_000, 50, 100)  # objects until a collection of the youngest ones; then of the older generations


def collect_rarely() -> None:
    """Make collections rare. Explicit ones, as vLLM makes before it measures memory, are not changed."""
    gc.set_threshold(*_WHILE_STARTING)


def end_start() -> None:
    """Collect once, exclude what is left from later collections, and make these as frequent as before."""
    gc.collect()
    gc.freeze()  # imports and the job live until the end
    gc.set_threshold(*_USUAL)
