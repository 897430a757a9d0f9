"""Bins of the histogram of probability ratios. They are narrow around 1, where a single update leaves most tokens.

Asserted by tests/unit/observe/test_ratio_bins.py and tests/parallel/test_update.py.
"""

from __future__ import annotations

import math

_SMALLEST, _DECADES, _PER_DECADE = 1e-5, 6, 4  # of |log ratio|, in nats
_STEPS = [_SMALLEST * 10 ** (i / _PER_DECADE) for i in range(_DECADES * _PER_DECADE + 1)]

RATIO_LIMITS: tuple[float, ...] = tuple(math.exp(x) for x in [*(-each for each in reversed(_STEPS)), *_STEPS])
"""Upper limits of the bins, ascending; the last bin holds all ratios above the last limit but one."""
EMPTY_COUNTS: tuple[float, ...] = (0.0,) * len(RATIO_LIMITS)
"""Counts of no tokens."""
