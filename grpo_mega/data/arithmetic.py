"""The generated task of the quickstart: "`a+b=`" with 0 <= a, b < 100, answered with the sum.

All 10,000 pairs are put in one fixed order and cut into three disjoint sets: `taught` (the base model sees them),
`train` (GRPO sees them) and `heldout` (only evaluation sees them). Pure: the same sets on every machine, in every run.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Literal

ArithmeticSet = Literal["taught", "train", "heldout"]
Pair = tuple[int, int]

LIMIT = 100
ALPHABET = "0123456789+= "
SET_SIZES: dict[ArithmeticSet, int] = {"heldout": 300, "train": 4200, "taught": 5500}
_SEED = "arithmetic-0"


@cache
def _sets() -> dict[ArithmeticSet, tuple[Pair, ...]]:
    # A sort by hash and not a library's shuffle: which pair is held out must never depend on a version.
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
    """The pairs (a, b) of one set, in their fixed order."""
    return _sets()[name]


def question(pair: Pair) -> str:
    """The prompt's text, e.g. "`7+58=`"."""
    return f"{pair[0]}+{pair[1]}="


def answer(pair: Pair) -> str:
    """The sum in decimal digits."""
    return str(pair[0] + pair[1])
