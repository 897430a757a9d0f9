r"""Parse the tokens of a final answer: one value, a list, a set, an interval, a relation, a matrix or words.

Rules for answers with several parts:

- `3, 4`, `3 or 4`, `3 and 4` and `\pm 3` are lists of values without an order. A list with dots has an order.
- `(3, 4)`, `[3, 4)` and other brackets have an order, and their kind matters. `\{3, 4\}` has no order.
- `x = 3` is the value 3 with the label `x`. Labels that both answers give must be the same.
- `5 cm` is the value 5 with a unit. Units that both answers give must be the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from grpo_mega.rewards.math_answers.brackets import check_brackets, matching_bracket, split_at_top, without_group
from grpo_mega.rewards.math_answers.expressions import Expression, UnreadableError, parse_expression, read_number
from grpo_mega.rewards.math_answers.quantity_names import is_label, is_quantity
from grpo_mega.rewards.math_answers.tokens import Token
from grpo_mega.rewards.math_answers.units import SCALES, Unit, read_unit

_RELATIONS = frozenset(("=", "~=", "<", ">", "<=", ">=", "!=", "in"))
_CURRENCIES = ("dollar", "euro", "pound", "yen")
_ANGLE_FUNCTIONS = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))
_LOGIC = {Token("mark", "lor"): Token("word", "or"), Token("mark", "land"): Token("word", "and")}
_MAX_DEPTH = 12
_DOTS = Token("mark", "...")
_SPEED = ["m", "/", "s"]  # the only unit that may be written in letters of variables


class MathAnswer(NamedTuple):
    """A parsed answer.

    Kinds and their parts: scalar (expression), bracket (opening, closing, items), set (items), list (items), matrix
    (kind, rows), union (parts), difference (set, removed set), relation (operators, sides), colon (items), words
    (texts), dots.
    """

    kind: str
    parts: tuple[Any, ...]
    label: tuple[Token, ...] = ()
    unit: Unit | None = None
    tokens: tuple[Token, ...] = ()
    separator: str = ""


def parse_answer(tokens: Sequence[Token], depth: int = 0) -> MathAnswer:
    """Return the answer that all tokens form.

    Raises:
        UnreadableError: a token is left over, brackets do not match, or a part has no supported form.
    """
    if depth > _MAX_DEPTH:
        raise UnreadableError
    check_brackets(tokens)
    tokens = _with_words_for_logic(without_group(tokens))
    groups = _named_groups(tokens, depth)
    if groups is not None:
        return groups
    items, separators = _split_list(tokens)
    if len(items) == 1:
        return _parse_item(items[0], depth)
    parsed = [_parse_item(item, depth) for item in items]
    label: tuple[Token, ...] = ()
    labels = [item.label for item in parsed]
    if labels[0] and (not any(labels[1:]) or len(set(labels)) == 1) and parsed[0].kind != "relation":
        label, parsed = labels[0], [item._replace(label=()) for item in parsed]
    separator = "or" if separators == {"or"} else "and"
    return MathAnswer("list", (tuple(parsed),), label=label, separator=separator)


def _named_groups(tokens: Sequence[Token], depth: int) -> MathAnswer | None:
    """Return the list of solutions `x=1, y=2 or x=3, y=4`; None if the tokens are not of this form."""
    for mark in (";", "or"):
        parts = [part for part, _ in split_at_top(tokens, (mark,))]
        if len(parts) < 2 or not all(Token("mark", ",") in part and Token("mark", "=") in part for part in parts):
            continue
        groups = tuple(parse_answer(part, depth + 1) for part in parts)
        labels = [[item.label for item in group.parts[0]] for group in groups if group.kind == "list"]
        if len(labels) == len(groups) and all(all(names) and len(names) == len(set(names)) for names in labels):
            return MathAnswer("list", (groups,), separator="and")
    return None


def _with_words_for_logic(tokens: Sequence[Token]) -> Sequence[Token]:
    r"""Replace `\lor` and `\land` between relations by `or` and `and`; a formula of logic keeps them."""
    if not any(token in _LOGIC for token in tokens):
        return tokens
    parts = list(split_at_top(tokens, ("lor", "land")))
    if not all(len(list(split_at_top(part, _RELATIONS))) > 1 for part, _ in parts):
        raise UnreadableError
    return [_LOGIC.get(token, token) for token in tokens]


def _split_list(tokens: Sequence[Token]) -> tuple[list[list[Token]], set[str]]:
    items: list[list[Token]] = []
    separators: set[str] = set()
    previous = ""
    for part, separator in split_at_top(tokens, (",", ";", "or", "and")):
        if part:
            items.append(part)
        elif previous not in (",", ";") or separator not in ("or", "and"):  # only `3, or 4` has an empty part
            raise UnreadableError
        if separator:
            separators.add(separator if separator in ("or", "and") else ",")
        previous = separator
    if separators & {"or"}:
        separators.discard(",")
    return items, separators


def _parse_item(tokens: Sequence[Token], depth: int) -> MathAnswer:
    tokens = without_group(tokens)
    pieces = list(split_at_top(tokens, _RELATIONS))
    sides, operators = [part for part, _ in pieces], [mark for _, mark in pieces[:-1]]
    if not operators:
        return _parse_value(tokens, depth)
    may_begin = operators[0] == "~=" or operators == ["="]
    if not all(sides) and not (may_begin and all(sides[1:])):
        raise UnreadableError
    if len(operators) == 1 and not sides[0]:  # = 5
        return _parse_value(sides[1], depth)
    if operators == ["in"] and is_label(sides[0]):
        return _parse_value(sides[1], depth)._replace(label=tuple(sides[0]))
    if set(operators) <= {"=", "~="}:
        return _parse_equation(sides, operators, depth)
    return MathAnswer("relation", (tuple(operators), tuple(parse_expression(side) for side in sides)))


def _parse_equation(sides: list[list[Token]], operators: list[str], depth: int) -> MathAnswer:
    num_labels = 0
    while num_labels < len(sides) - 1 and is_quantity(sides[num_labels]):  # AB = CD = 5
        num_labels += 1
    if num_labels:
        rest = sides[num_labels:]
        value = _parse_value(rest[0], depth) if len(rest) == 1 else _parse_chain(rest, operators[num_labels:], depth)
        return value._replace(label=tuple(sides[0]))
    if len(sides) == 2 and is_quantity(sides[1]):
        return _parse_value(sides[0], depth)._replace(label=tuple(sides[1]))
    return _parse_chain(sides, operators, depth)


def _parse_chain(sides: list[list[Token]], operators: list[str], depth: int) -> MathAnswer:
    return MathAnswer("chain", (tuple(_parse_value(side, depth) for side in sides), tuple(operators)))


def is_word_of_capitals(tokens: Sequence[Token]) -> bool:
    """Return True for two or more capital letters without a sign between them: points, outcomes or a product."""
    return len(tokens) > 1 and all(kind == "symbol" and len(text) == 1 and text.isupper() for kind, text in tokens)


def _parse_value(tokens: Sequence[Token], depth: int) -> MathAnswer:
    tokens = without_group(tokens)
    if not tokens:
        raise UnreadableError
    if list(tokens) == [_DOTS]:
        return MathAnswer("dots", ())
    for mark, kind in (("cup", "union"), ("setminus", "difference")):
        parts = [part for part, _ in split_at_top(tokens, (mark,))]
        if len(parts) > 1:
            if kind == "difference" and len(parts) > 2:
                raise UnreadableError
            return MathAnswer(kind, tuple(_parse_value(part, depth + 1) for part in parts))
    if any(kind == "mark" and text.startswith("begin ") for kind, text in tokens):
        return _parse_matrix(tokens)
    is_line_without = [token.text for token in tokens[:3]] == [r"\bb{R}", "-", "\\{"]
    if is_line_without and matching_bracket(tokens[2:]) == len(tokens) - 3:
        return MathAnswer("difference", (_parse_value(tokens[:1], depth + 1), _parse_value(tokens[2:], depth + 1)))
    words = _read_words(tokens)
    if words is not None:
        return words
    first = tokens[0].text if tokens[0].kind == "mark" else ""
    if first in ("(", "[", "\\{") and matching_bracket(tokens) == len(tokens) - 1:
        structure = _parse_bracket(first, tokens[-1].text, tokens[1:-1], depth)
        if structure is not None:
            return structure
    parts = [part for part, _ in split_at_top(tokens, (":",))]
    if len(parts) > 1:
        return MathAnswer("colon", tuple(_parse_scalar(part) for part in parts))
    return _parse_scalar(tokens)


def _read_words(tokens: Sequence[Token]) -> MathAnswer | None:
    texts = [(kind, text) for kind, text in tokens if (kind, text) not in (("mark", "("), ("mark", ")"))]
    if len(texts) == 1 and len(texts[0][1]) == 1 and texts[0][1].isalpha() and texts[0][0] != "unknown":
        return MathAnswer("scalar", (Expression("symbol", (texts[0][1],)),), tokens=tuple(tokens))  # a choice: (B)
    if tokens[0].kind == "word" and all(kind == "word" or text in ("-", "'", ".") for kind, text in tokens):
        return MathAnswer("words", tuple(text.casefold() for kind, text in tokens if kind == "word"))
    return None


def _parse_bracket(opening: str, closing: str, inner: Sequence[Token], depth: int) -> MathAnswer | None:
    if opening == "\\{":
        return _parse_set(inner, depth)
    parts = [part for part, _ in split_at_top(inner, (",", ";"))]
    if len(parts) == 1:
        has_relation = len(list(split_at_top(inner, _RELATIONS))) > 1
        if opening == "[" and closing == "]" and has_relation:
            return parse_answer(inner, depth + 1)  # [x=1]
        if (opening, closing) != ("(", ")"):
            raise UnreadableError
        return None
    items = tuple(_parse_item(part, depth + 1) for part in parts)
    if opening == "[" and all(item.label for item in items):
        return MathAnswer("list", (items,), separator="and")  # [x=1, y=2]
    return MathAnswer("bracket", (opening, closing, items))


def _parse_set(inner: Sequence[Token], depth: int) -> MathAnswer:
    if not inner:
        return MathAnswer("set", ((),))
    parts = list(split_at_top(inner, ("|", ":")))
    if len(parts) == 2:  # \{x \mid x > 2\}
        (name, _), *domains = split_at_top(parts[0][0], ("in",))
        condition = parts[1][0]
        is_real = all(part == [Token("symbol", r"\bb{R}")] for part, _ in domains)
        if not is_label(name) or not condition or not is_real:
            raise UnreadableError
        return parse_answer(condition, depth + 1)
    content = parse_answer(inner, depth + 1)
    if content.label or content.kind == "relation":
        return content if content.kind == "relation" else MathAnswer("set", ((content,),))
    return MathAnswer("set", content.parts if content.kind == "list" else ((content,),))


def _parse_matrix(tokens: Sequence[Token]) -> MathAnswer:
    r"""Parse `c [begin ... end]^T`: a matrix with an optional factor before it and an optional transposition."""
    begin = next(k for k, token in enumerate(tokens) if token.text.startswith("begin "))
    end = begin + matching_bracket(tokens[begin:])
    name, kind = tokens[begin].text[6:], ""
    before, after = list(tokens[:begin]), list(tokens[end + 1 :])
    brackets = {"array": ("(", "[", "|", "{"), "matrix": ("(", "[", "|"), "smallmatrix": ("(", "[", "|")}.get(name, ())
    if before and after and before[-1].text in brackets:
        kind = before.pop().text
        after.pop(0)
    elif name in ("pmatrix", "bmatrix", "vmatrix", "Vmatrix", "matrix", "smallmatrix"):
        kind = {"vmatrix": "|", "Vmatrix": "norm"}.get(name, "[")
    else:
        raise UnreadableError
    rows = [
        tuple(parse_expression(cell) for cell, _ in split_at_top(row, ("amp",)))
        for row, _ in split_at_top(tokens[begin + 1 : end], ("row",))
        if row
    ]
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise UnreadableError
    if [token.text for token in after] in (["^", "T"], ["^", "{", "T", "}"]):
        rows, after = list(zip(*rows, strict=True)), []
    if after or (before and before[-1].text in ("+", "=")):
        raise UnreadableError
    if kind == "|" and len(rows) == len(rows[0]) <= 3:
        determinant = _determinant(rows)
        if [token.text for token in before] in ([], ["-"]):
            return MathAnswer("scalar", (Expression("negate", (determinant,)) if before else determinant,))
        factor = parse_expression(before[:-1] if before[-1].text == "*" else before)
        return MathAnswer("scalar", (Expression("multiply", (factor, determinant)),))
    if [token.text for token in before] == ["-"]:
        rows = [tuple(Expression("negate", (cell,)) for cell in row) for row in rows]
    elif before:
        factor = parse_expression(before[:-1] if before[-1].text == "*" else before)
        rows = [tuple(Expression("multiply", (factor, cell)) for cell in row) for row in rows]
    return MathAnswer("matrix", ("|" if kind == "|" else "norm" if kind == "norm" else "[", tuple(rows)))


def _determinant(rows: Sequence[Sequence[Expression]]) -> Expression:
    if len(rows) == 1:
        return rows[0][0]
    terms: list[Expression] = []
    for column, cell in enumerate(rows[0]):
        minor = _determinant([[*row[:column], *row[column + 1 :]] for row in rows[1:]])
        term = Expression("multiply", (cell, minor))
        terms.append(Expression("negate", (term,)) if column % 2 else term)
    return Expression("add", tuple(terms))


def _parse_scalar(tokens: Sequence[Token]) -> MathAnswer:
    original = tuple(tokens)
    sign: list[Token] = []
    if len(tokens) > 1 and tokens[0].text in ("-", "+", "pm") and tokens[1].text in _CURRENCIES:
        sign, tokens = [tokens[0]], tokens[1:]
    if tokens and tokens[0].kind == "mark" and tokens[0].text in _CURRENCIES:
        amount = _parse_scalar([*sign, *tokens[1:]])
        if amount.unit not in (None, frozenset(((tokens[0].text, 1),))):
            raise UnreadableError
        return amount._replace(unit=frozenset(((tokens[0].text, 1),)), tokens=original)
    for position in range(1, len(tokens)):
        kind, text = tokens[position]
        is_speed = tokens[position - 1].kind == "number" and [t.text for t in tokens[position : position + 3]] == _SPEED
        if not (kind in ("word", "upright") or is_speed or text in ("degree", "percent", *_CURRENCIES)):
            continue
        if tokens[position - 1].text in ("_", "{") or (
            text == "degree" and any(token.text in _ANGLE_FUNCTIONS for token in tokens)
        ):
            continue
        power = SCALES.get(text.casefold(), 0) if kind == "word" else 0
        rest = _as_unit_tokens(tokens[position + (power > 0) :], is_speed)
        unit = read_unit(rest) if rest else None
        if unit is None and not (power and not rest):
            continue
        value = parse_expression(tokens[:position])
        if power:
            value = Expression("multiply", (value, read_number(f"1e{power}")))
        return MathAnswer("scalar", (value,), unit=unit or None, tokens=original)
    return MathAnswer("scalar", (parse_expression(tokens),), tokens=original)


def _as_unit_tokens(tokens: Sequence[Token], is_speed: bool) -> list[Token]:
    """Return the tokens of a possible unit, with currencies as words and the letter in `km/h` as a unit."""
    unit: list[Token] = []
    for position, (kind, text) in enumerate(tokens):
        is_letter = kind == "symbol" and (is_speed or (position > 1 and tokens[position - 1].text == "/"))
        new_kind = "upright" if is_letter else "word" if text in _CURRENCIES else kind
        unit.append(Token(new_kind, text))
    return unit
