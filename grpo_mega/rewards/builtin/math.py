r"""Reward `math`: the final answer of the completion is mathematically equal to that of the reference.

Answers may be LaTeX or plain text. The final answer is the last `\boxed{x}`. Without a box, and unless `strict`, it is
the answer at the end of the text. `grpo_mega/rewards/math_answers/` extracts, parses and compares answers, and
docs/rewards.md states its rules. A reference in words (`No, it is not closed.`) is compared as words.

Invariants (tests/unit/rewards/builtin/test_math.py): every answer of the test data equals itself and its simple
rewritings, and differs from the next one; a changed digit, point, bracket or sign makes an answer wrong; no answer is
expensive to evaluate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from grpo_mega.rewards.base import reward
from grpo_mega.rewards.cpu_limit import within_cpu_seconds
from grpo_mega.rewards.final_answers.answer_boxes import boxed_answer
from grpo_mega.rewards.final_answers.finder import FinalAnswer, Source, find_final_answer
from grpo_mega.rewards.final_answers.hedges import visible_answer
from grpo_mega.rewards.final_answers.markers import DECORATION, marked_answer
from grpo_mega.rewards.final_answers.statements import Readings, sentence_tails, stated_word
from grpo_mega.rewards.math_answers.comparable_tokens import words_of
from grpo_mega.rewards.math_answers.equality import MAX_ANSWER_CHARACTERS, is_prose, is_right
from grpo_mega.types import UserError

_SOURCES_WITHOUT_BOX: tuple[Source, ...] = ("tags", "markers", "phrases", "results", "sentences")
_PLAIN_BOX = re.compile(r"\\?\b[Bb]oxed\{([^{}]*)\}")
_CONTRARY = {"yes": "no", "no": "yes", "true": "false", "false": "true"}


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
    text = visible_answer(prompt, completion)
    if not text.strip():
        return False
    found = find_final_answer(text, ("boxes",), boxes_may_be_retracted=True, prompt=prompt)
    if found is not None:
        return _are_right_boxes(found, expected)
    if strict:
        return False
    for only_answer in dict.fromkeys((text, text.strip("*_` \n"))):  # the completion is only the answer
        if len(only_answer) <= MAX_ANSWER_CHARACTERS and is_right(only_answer, expected):
            return True
    word = stated_word(text)
    if word is not None and is_right(word, expected):
        return True
    found = find_final_answer(
        _PLAIN_BOX.sub(r"\1", text), _SOURCES_WITHOUT_BOX, boxes_may_be_retracted=True, prompt=prompt
    )
    statements = _statements(found) if found is not None else []
    if is_prose(expected):
        return _says_words(text, statements, expected)
    return _are_right(statements, expected)


def _are_right_boxes(found: FinalAnswer, expected: str) -> bool:
    if found.is_vague:
        return False
    texts = list(dict.fromkeys((box.text, box.label) for box in found.boxes))
    labeled = [f"{name} = {text}" if name and "=" not in text else text for text, name in texts]
    behind = all(any(is_right(reading, expected) for reading in readings) for readings in found.readings)
    if behind and all(is_right(text, expected) for text in labeled):
        return True
    return len(texts) > 1 and is_right(" ; ".join(labeled), expected)


def _statements(found: FinalAnswer) -> list[Readings]:
    lines = [(line.text.strip(DECORATION),) for line in found.lines]
    return [] if found.is_vague else list(dict.fromkeys([*lines, *found.readings]))


def _are_right(statements: Sequence[Readings], expected: str) -> bool:
    if not statements:
        return False
    return all(any(is_right(reading, expected) for reading in readings) for readings in statements) or (
        len(statements) > 1 and is_right(" ; ".join(readings[0] for readings in statements), expected)
    )


def _says_words(text: str, statements: Sequence[Readings], expected: str) -> bool:
    """Return True when a completion ends with the words of a reference in words, and does not say the contrary."""
    words = words_of(expected)
    if statements and all(any(words_of(reading) == words for reading in readings) for readings in statements):
        return True
    contrary = _CONTRARY.get(words[0]) if words else None
    for tail in sentence_tails(text, len(expected)):
        if words_of(tail) == words:
            before = text.rstrip()[: len(text.rstrip()) - len(tail)]
            return contrary is None or re.search(rf"(?:^|[.!?\n])\s*{contrary}\b", before, re.IGNORECASE) is None
    return False
