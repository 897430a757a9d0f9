"""Structure of the brackets in the tokens of an answer: pairs, and splits at marks outside of all brackets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from grpo_mega.rewards.math_answers.expressions import UnreadableError
from grpo_mega.rewards.math_answers.tokens import Token

_OPENING = frozenset(("(", "[", "{", "\\{", "lfloor", "lceil"))
_CLOSING = frozenset((")", "]", "}", "\\}", "rfloor", "rceil"))


def check_brackets(tokens: Sequence[Token]) -> None:
    """Raise UnreadableError when a bracket is not closed, or a closing bracket has no partner."""
    closing = {"(": ")]", "[": ")]", "{": "}", "\\{": ("\\}",), "lfloor": ("rfloor",), "lceil": ("rceil",)}
    stack: list[str] = []
    for kind, text in tokens:
        if kind == "mark" and (text in _OPENING or text.startswith("begin ")):
            stack.append(text)
        elif kind == "mark" and (text in _CLOSING or text.startswith("end ")):
            opening = stack.pop() if stack else ""
            if text not in closing.get(opening, ()) and text != opening.replace("begin", "end"):
                raise UnreadableError
    if stack:
        raise UnreadableError


def split_at_top(tokens: Sequence[Token], marks: frozenset[str] | tuple[str, ...]) -> Iterator[tuple[list[Token], str]]:
    """Yield the parts between marks outside of all brackets, each with the mark behind it (empty for the last part)."""
    part: list[Token] = []
    depth = 0
    for token in tokens:
        kind, text = token
        if kind == "mark":
            depth += text in _OPENING or text.startswith("begin ")
            depth -= text in _CLOSING or text.startswith("end ")
        if depth == 0 and (kind == "mark" or (kind == "word" and text.casefold() in ("or", "and"))):
            name = text.casefold() if kind == "word" else text
            if name in marks:
                yield part, name
                part = []
                continue
        part.append(token)
    yield part, ""


def without_group(tokens: Sequence[Token]) -> Sequence[Token]:
    """Remove TeX's braces around everything."""
    while len(tokens) > 1 and tokens[0] == Token("mark", "{") and matching_bracket(tokens) == len(tokens) - 1:
        tokens = tokens[1:-1]
    return tokens


def matching_bracket(tokens: Sequence[Token]) -> int:
    """Return the position of the bracket that closes the first token."""
    depth = 0
    for position, (kind, text) in enumerate(tokens):
        if kind == "mark":
            depth += text in _OPENING or text.startswith("begin ")
            depth -= text in _CLOSING or text.startswith("end ")
        if depth == 0:
            return position
    raise UnreadableError
