"""Reward `exact`: the answer of the completion equals the reference, except for white space at both ends.

If both are plain numbers, their values are compared: `5.0` and `5.00` equal `5`. A plain number is written in ASCII
digits, without leading zeros, a plus sign, separators or a unit. A thought is not part of the answer (thought.py).
"""

from __future__ import annotations

import re
from fractions import Fraction

from grpo_mega.rewards.base import reward
from grpo_mega.rewards.thought import answer_part

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,99})(?:\.[0-9]{1,100})?(?:[eE][-+]?[0-9]{1,3})?")


@reward(low=0.0, high=1.0)
def exact(prompt: str, completion: str, reference: str) -> float:
    """Return 1 when the answer and `reference` are equal, as texts without white space at the ends or as numbers.

    Args:
        prompt: if it ends with an opened thought, the completion begins inside of it.
        completion: compared without its thoughts.
        reference: a text, or a number; a number in the data is written as Python writes it.
    """
    expected = reference.strip()
    answer = answer_part(prompt, completion).strip()
    if answer == expected:
        return 1.0
    is_numeric = _NUMBER.fullmatch(expected) is not None and _NUMBER.fullmatch(answer) is not None
    return float(is_numeric and Fraction(answer) == Fraction(expected))
