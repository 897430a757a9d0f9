r"""Tokens in a form in which equal answers have equal texts: `x^{2}` is `x^2`, `No solution.` is `no solution`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from grpo_mega.rewards.math_answers.tokens import Token, tokenize

_LEAD_IN = re.compile(
    r"\s*(?:\\text\s*\{)?\s*(?:the\s+)?(?:final\s+|correct\s+)?(?:solutions?|answers?)\s*(?:(?:is|are)\s*:?|:)\s*\}?\s*",
    re.IGNORECASE,
)
_PUNCTUATION = frozenset((".", ",", ";", ":", '"', "`"))


def words_of(text: str) -> tuple[str, ...]:
    """Return the comparable tokens of a text: words in lower case, without punctuation between them."""
    return comparable_texts(answer_tokens(text))


def answer_tokens(text: str, *, join_thousands: bool = True) -> list[Token]:
    """Return the tokens of an answer without words like "the answer is" before it and a point behind it."""
    match = _LEAD_IN.match(text)
    if match is not None and match.end() < len(text):
        is_open = "\\text" in match.group() and "}" not in match.group()
        text = text[match.end() :].replace("}", "", is_open)  # \text{The answer is 5}
    tokens = tokenize(text, join_thousands=join_thousands)
    if tokens and tokens[-1] in (Token("mark", "."), Token("mark", ",")):  # two points are dots
        tokens.pop()
    return tokens


def comparable_texts(tokens: Sequence[Token]) -> tuple[str, ...]:
    """Return the texts of tokens, equal for equal answers: words in lower case, and in prose without punctuation."""
    texts: list[str] = []
    is_prose = any(token.kind == "word" for token in tokens)
    is_letter: list[bool] = []
    for kind, text in tokens:
        if is_prose and kind == "mark" and text in _PUNCTUATION:
            continue
        texts.append(text.casefold() if kind == "word" and len(text) > 1 else text)
        is_letter.append(kind != "word" and len(text) == 1 and text.isalpha())
    if is_prose:
        texts = _joined_letters(texts, is_letter)
    position = 0
    while position + 3 < len(texts):  # x^{2} is x^2
        if texts[position] in ("^", "_", "\\pmod") and texts[position + 1] == "{" and texts[position + 3] == "}":
            texts[position + 1 : position + 4] = [texts[position + 2]]
        position += 1
    while len(texts) > 2 and texts[0] == "{" and texts[-1] == "}" and texts.count("{") == 1:
        texts = texts[1:-1]
    return tuple(texts)


def _joined_letters(texts: list[str], is_letter: list[bool]) -> list[str]:
    """Join the letters of a short word that was read as a product, like `real` in `all real numbers`."""
    joined: list[str] = []
    is_open = False
    for text, is_part in zip(texts, is_letter, strict=True):
        if is_part and is_open:
            joined[-1] += text
        else:
            joined.append(text)
        is_open = is_part
    return [text if len(text) == 1 or text.isupper() else text.casefold() for text in joined]
