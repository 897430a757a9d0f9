r"""Recognize the name of a quantity before a value: `x`, `AB`, `f(2)`, `P(A \cap B)`."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mega.rewards.math_answers.brackets import matching_bracket
from grpo_mega.rewards.math_answers.tokens import Token
from grpo_mega.rewards.math_answers.vocabulary import split_words

_LABEL_MARKS = frozenset(("'", "_", "{", "}", "^", "-", "(", ")", ","))
_CONSTANTS = frozenset(("e", "i", "pi", "oo", "empty"))
_NOT_LABELS = frozenset(
    split_words(
        "not no or and either maybe if suppose assume let unless when false that perhaps possibly never option "
        "consider given for try choose take case say like possible likely unlikely"
    )
)
_NAMES_OF_FUNCTIONS = frozenset(split_words("f g h p q E F G H P Q T Var Cov"))
_PRIME = Token("mark", "'")


def is_label(tokens: Sequence[Token]) -> bool:
    r"""Return True for the name of a quantity: `x`, `f^{-1}(x)`, `AB`, `\mathbf{u}_2`, `(x, y)`, `\text{Area}`.

    `xy` and `x^2` are expressions and no names.
    """
    if len(tokens) > 2 and tokens[0] == tokens[-1] == Token("mark", "|"):  # the length |AB|
        return all(kind == "symbol" and text.isupper() for kind, text in tokens[1:-1])
    if not 0 < len(tokens) <= 20 or all(token.text in _CONSTANTS for token in tokens):
        return False
    texts = [token.text for token in tokens]
    for position, (kind, text) in enumerate(tokens):
        previous = texts[position - 1] if position else ""
        if kind == "number" and previous not in ("_", "{", "-"):
            return False
        if kind == "mark" and text in ("^", "-") and texts[position : position + 5] != ["^", "{", "-", "1", "}"]:
            if text == "^" or texts[position - 2 : position] != ["^", "{"]:
                return False
        elif kind == "mark" and text not in _LABEL_MARKS:
            return False
        if kind == "function" or (kind == "unknown" and text not in ("\\angle", "\\triangle", "\\overrightarrow")):
            return False
        if kind == "word" and text.casefold() in _NOT_LABELS:
            return False
    kind, text = tokens[0]
    if "^" in texts and not (text in ("f", "g", "h") or text.isupper()):
        return False
    if len(tokens) > 1 and all(token.kind == "symbol" for token in tokens) and not "".join(texts).isupper():
        return False
    return kind in ("symbol", "upright", "word", "unknown") or (text == "(" and Token("mark", ",") in tokens)


def is_quantity(tokens: Sequence[Token]) -> bool:
    r"""Return True for a name, or for a value of a function that names a quantity before `=`.

    `f(2)`, `f''(1)`, `P(A \cap B)` and `E[X]` name one value each. `2x`, `a+b`, `\sin\theta` and `|x|` do not:
    `2x = 10`, `a+b = 5` and `\sin\theta = 1` are equations.
    """
    if is_label(tokens):
        return True
    texts = [token.text for token in tokens]
    if not 2 <= len(texts) <= 20:
        return False
    begin = 1
    while tokens[begin : begin + 1] == [_PRIME]:
        begin += 1
    if texts[0] not in _NAMES_OF_FUNCTIONS or begin > len(tokens) - 3 or texts[begin] not in ("(", "["):
        return False
    return matching_bracket(tokens[begin:]) == len(tokens) - begin - 1
