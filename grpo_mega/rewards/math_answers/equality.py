r"""Decide whether an answer is right, given the text of the reference answer.

An answer is right in one of two cases: its tokens are those of the reference, or both can be parsed completely and
are equal. An answer that names several values is right only if the reference names the same ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from grpo_mega.rewards.math_answers.agreement import agree
from grpo_mega.rewards.math_answers.answers import MathAnswer, parse_answer
from grpo_mega.rewards.math_answers.brackets import split_at_top
from grpo_mega.rewards.math_answers.comparable_tokens import answer_tokens, comparable_texts
from grpo_mega.rewards.math_answers.exact import UndefinedError
from grpo_mega.rewards.math_answers.expressions import MAX_TOKENS, UnreadableError
from grpo_mega.rewards.math_answers.tokens import Token
from grpo_mega.rewards.math_answers.units import NOT_UNITS
from grpo_mega.rewards.math_answers.variants import with_variants

MAX_ANSWER_CHARACTERS = 2000
_CHOICES = frozenset("ABCDEFGH")
_JOINING = frozenset(("or", "and", "nor", "not", "but", "if", "unless", "maybe", "perhaps", "possibly"))


def is_right(answer: str, reference: str) -> bool:
    """Return True when the answer equals the reference answer."""
    if len(answer) > MAX_ANSWER_CHARACTERS + 2 * len(reference):
        return False
    expected, forms = _read_reference(reference)
    tokens = answer_tokens(answer)
    if not tokens:
        return False
    if comparable_texts(tokens) == expected:
        return True
    if not forms or len(tokens) > MAX_TOKENS:
        return False
    if _parses_and_agrees(tokens, forms):
        return True
    lists = [form for form in forms if form.kind == "list"]
    separate = answer_tokens(answer, join_thousands=False) if lists else tokens
    if separate != tokens and _parses_and_agrees(separate, lists):  # 40,200 where the reference is 40, 200
        return True
    letter, value = _choice_and_value(tokens)
    return bool(letter) and (_parses_and_agrees(letter, forms) or _parses_and_agrees(value, forms))


def _parses_and_agrees(tokens: Sequence[Token], forms: Sequence[MathAnswer]) -> bool:
    try:
        parsed = with_variants(parse_answer(tokens))
        return any(agree(form, parsed) for form in forms)
    except (UnreadableError, UndefinedError):
        return False


def _choice_and_value(tokens: Sequence[Token]) -> tuple[Sequence[Token], Sequence[Token]]:
    """Return the letter and the value of `(B) 15`, an answer to a question with choices; nothing of other answers.

    An answer that names a second letter (`(B) C`, `(B) 15 or (C) 16`) or joins several values by a word (`(B) or 15`,
    `(B) 15 or 16`) is not of this form.
    """
    if [token.text for token in tokens[:2]] == ["{", "("] and [token.text for token in tokens[3:5]] == [")", "}"]:
        tokens = [*tokens[1:4], *tokens[5:]]
    has_letter = len(tokens) > 3 and tokens[0].text == "(" and tokens[1].text in _CHOICES and tokens[2].text == ")"
    names_one = not any(token.text in _CHOICES or token.text.casefold() in _JOINING for token in tokens[3:])
    if has_letter and names_one and tokens[3].kind in ("number", "function", "word", "symbol"):
        return tokens[1:2], tokens[3:]
    return (), ()


def is_prose(reference: str) -> bool:
    """Return True when a reference is compared as words: it contains a word, and is no formula, list or number."""
    forms = _read_reference(reference)[1]
    has_word = any(token.kind == "word" for token in answer_tokens(reference))
    return has_word and all(form.kind == "words" for form in forms)


@functools.lru_cache(maxsize=4096)
def _read_reference(reference: str) -> tuple[tuple[str, ...], tuple[MathAnswer, ...]]:
    r"""Return the comparable tokens of a reference, and its parsed forms.

    There may be several: `x \le 2: (-\infty, 2]` has both halves, and a chain of equations that
    cannot be parsed has its last member.
    """
    tokens = answer_tokens(reference)
    alternatives = [tokens]
    halves = [part for part, _ in split_at_top(tokens, (":",))]
    if len(halves) == 2 and any(token.text in ("<", ">", "<=", ">=", "empty") for token in tokens):
        alternatives += [half for half in halves if half]
    members = [part for part, _ in split_at_top(tokens, ("=", "~="))]
    if len(members) > 1 and members[-1] and not any(token.kind == "word" for token in tokens):
        alternatives.append(members[-1])
    forms: list[MathAnswer] = []
    for alternative in alternatives:
        try:
            form = with_variants(parse_answer(alternative))
        except (UnreadableError, UndefinedError):
            continue
        if alternative is not members[-1] or not forms:
            forms.append(form)
    forms += [] if forms else _value_with_unknown_unit(tokens)
    return comparable_texts(tokens), tuple(dict.fromkeys(forms))


def _value_with_unknown_unit(tokens: Sequence[Token]) -> list[MathAnswer]:
    """Return the value of a reference like `5 widgets`, with the words behind it as its unit."""
    position = len(tokens)
    while position and tokens[position - 1].kind == "word" and tokens[position - 1].text.casefold() not in NOT_UNITS:
        position -= 1
    if position in (0, len(tokens)) or any(token.kind == "word" for token in tokens[:position]):
        return []
    try:
        form = with_variants(parse_answer(tokens[:position]))
    except (UnreadableError, UndefinedError):
        return []
    name = " ".join(token.text.casefold() for token in tokens[position:])
    return [form._replace(unit=frozenset(((name, 1),)))] if form.kind == "scalar" and form.unit is None else []
