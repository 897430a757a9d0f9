"""The generated task of the quickstart: "`a+b=`" with 0 <= a, b < 100, and the sum as the answer.

All 10,000 pairs have one fixed order and are divided into three disjoint sets: `pretrain` (for the tiny base model),
`train` (for GRPO) and `heldout` (for evaluation only). The sets are the same on every machine and in every run.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Literal

ArithmeticSet = Literal["pretrain", "train", "heldout"]
Pair = tuple[int, int]

LIMIT = 100
ALPHABET = "0123456789+= "
SET_SIZES: dict[ArithmeticSet, int] = {"heldout": 300, "train": 4200, "pretrain": 5500}
_SEED = "arithmetic-0"


@cache
def _sets() -> dict[ArithmeticSet, tuple[Pair, ...]]:
    # Sorted by a hash instead of a library's shuffle: the held-out pairs must not depend on a library version.
    order = sorted(
        ((a, b) for a in range(LIMIT) for b in range(LIMIT)),
        key=lambda pair: hashlib.sha256(f"{_SEED}:{pair[0]}+{pair[1]}".encode()).digest(),
    )
    sets: dict[ArithmeticSet, tuple[Pair, ...]] = {}
    begin = 0
    for name, size in SET_SIZES.items():
        sets[name] = tuple(order[begin : begin + size])
        begin += size
    assert begin == len(order), f"sets hold {begin} of {len(order)} pairs"
    return sets


def pairs(name: ArithmeticSet) -> tuple[Pair, ...]:
    """Return the pairs (a, b) of one set, in their fixed order."""
    return _sets()[name]


def question(pair: Pair) -> str:
    """Return the text of the prompt, for example "`7+58=`"."""
    return f"{pair[0]}+{pair[1]}="


def answer(pair: Pair) -> str:
    """Return the sum in decimal digits."""
    return str(pair[0] + pair[1])
