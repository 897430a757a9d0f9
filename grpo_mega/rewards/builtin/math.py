r"""Reward `math`: the final answer of the completion is mathematically equal to that of the reference.

Answers may be LaTeX or plain text. The final answer is the last `\boxed{x}`. Without a box, and unless `strict`, it is
the answer at the end of the text. `grpo_mega/rewards/math_answers/` extracts, parses and compares answers, and
docs/rewards.md states its rules. A reference in words (`No, it is not closed.`) is compared as words.

Invariants (tests/unit/rewards/builtin/test_math.py): every answer of the test data equals itself and its simple
rewritings, and differs from the next one; a changed digit, point, bracket or sign makes an answer wrong; no answer is
expensive to evaluate.
"""

from __future__ import annotations

from grpo_mega.rewards.base import reward
from grpo_mega.rewards.cpu_limit import within_cpu_seconds
from grpo_mega.rewards.math_answers.comparable_tokens import words_of
from grpo_mega.rewards.math_answers.equality import MAX_ANSWER_CHARACTERS, is_prose, is_right
from grpo_mega.rewards.math_answers.final_answer import (
    answer_in_prose,
    boxed_answer,
    marked_answer,
    sentence_tails,
)
from grpo_mega.rewards.thought import answer_part
from grpo_mega.types import UserError


def check_math_args(strict: bool = False, cpu_seconds: float = 2.0) -> None:
    """Check the arguments of `math`.

    Raises:
        UserError: `strict` is not a boolean, or `cpu_seconds` is out of range.
    """
    if not isinstance(strict, bool):
        raise UserError(f"strict={strict!r} must be true or false", remedy="use one of them")
    if isinstance(cpu_seconds, bool) or not isinstance(cpu_seconds, int | float) or not 0 < cpu_seconds < 3600:
        raise UserError(
            f"cpu_seconds={cpu_seconds!r} must be a number of seconds above 0", remedy="use for example 2.0"
        )


@reward(low=0.0, high=1.0, check_args=check_math_args)
def math(prompt: str, completion: str, reference: str, strict: bool = False, cpu_seconds: float = 2.0) -> float:
    r"""Return 1 when the final answers of completion and reference are equal, else 0.

    Args:
        prompt: an open `<think>` at its end means that the completion begins inside a thought.
        completion: the final answer is extracted from it.
        reference: only the answer, or a worked solution that ends in `\boxed{x}` or `#### x`.
        strict: accept only a box; an answer in prose is not an answer then.
        cpu_seconds: CPU time of one scoring.

    Raises:
        ValueError: the reference is empty.
        TimeoutError: the scoring used `cpu_seconds`. The rollout gets the floor and is counted as a failed scoring.
    """
    boxed = boxed_answer(reference)
    expected = (boxed if boxed is not None else marked_answer(reference) or reference).strip()
    if not expected:
        raise ValueError("the reference is empty; correct the data or its answer_key")
    result = within_cpu_seconds(cpu_seconds, lambda: _has_right_answer(prompt, completion, expected, strict))
    if result is None:
        raise TimeoutError(f"cpu_seconds={cpu_seconds:g} were used; the answer scores the floor")
    return float(result)


def _has_right_answer(prompt: str, completion: str, expected: str, strict: bool) -> bool:
    text = answer_part(prompt, completion)
    if not text.strip():
        return False
    answer = boxed_answer(text)
    if answer is not None:
        return is_right(answer, expected)
    if strict:
        return False
    if len(text) <= MAX_ANSWER_CHARACTERS and is_right(text, expected):  # the completion is only the answer
        return True
    if is_prose(expected):
        words = words_of(expected)
        if any(words_of(tail) == words for tail in sentence_tails(text, len(expected))):
            return True
    answer = answer_in_prose(text)
    return answer is not None and is_right(answer, expected)
