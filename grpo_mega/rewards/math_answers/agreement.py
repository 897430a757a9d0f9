r"""Decide whether two parsed answers agree: values, lists in any order, brackets in order, relations, regions, units.

Labels and units that both answers give must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grpo_mega.rewards.math_answers.answers import MathAnswer, is_word_of_capitals
from grpo_mega.rewards.math_answers.brackets import split_at_top
from grpo_mega.rewards.math_answers.exact import depends_on, fraction_value
from grpo_mega.rewards.math_answers.expressions import Expression, UnreadableError, parse_expression
from grpo_mega.rewards.math_answers.interval_sets import (
    are_equal_regions,
    increasing_relation,
    read_region,
    variable_of,
)
from grpo_mega.rewards.math_answers.scalars import are_equal_scalars, are_proportional, difference
from grpo_mega.rewards.math_answers.tokens import Token
from grpo_mega.rewards.math_answers.units import read_unit

_PERCENT = frozenset((("percent", 1),))
_HUNDREDTH = Expression("number", (1, 1, -2))
_ALL_REAL_NUMBERS = ("all", "real", "numbers"), ("all", "reals")
_REAL_LINE = MathAnswer("scalar", (Expression("symbol", (r"\bb{R}",)),))
_NOTHING = ("no", "solution"), ("no", "solutions")


def agree(reference: MathAnswer, answer: MathAnswer) -> bool:
    """Return True when an answer has the meaning of the reference answer."""
    named = _named_values(reference), _named_values(answer)
    if named[0] and named[1]:
        return named[0].keys() == named[1].keys() and all(agree(v, named[1][k]) for k, v in named[0].items())
    for values, other in ((named[0], answer), (named[1], reference)):
        if values and other.kind == "bracket" and not other.label and other.parts[:2] == ("(", ")"):
            order = sorted(values, key=lambda key: [token.text for token in key])
            return _agree_in_order([values[key] for key in order], other.parts[2])
    if reference.kind == "relation" or answer.kind == "relation":
        return _relations_agree(reference, answer)
    if reference.label and answer.label and reference.label != answer.label:
        return _relations_agree(reference, answer)
    return _values_agree(reference, answer)


def _named_values(answer: MathAnswer) -> dict[tuple[Token, ...], MathAnswer] | None:
    r"""Return the values of `x=1, y=2` or `(x, y)=(1, 2)` by their labels; None for another kind of answer."""
    if answer.kind == "list" and not answer.label:
        named = {item.label: item._replace(label=()) for item in answer.parts[0] if item.label}
        return named if len(named) == len(answer.parts[0]) > 1 else None
    if answer.kind == "set" and len(answer.parts[0]) > 1:
        return _named_values(MathAnswer("list", answer.parts))
    if answer.kind == "bracket" and answer.label and answer.label[0].text == "(":
        names = [tuple(part) for part, _ in split_at_top(answer.label[1:-1], (",",))]
        if len(names) == len(set(names)) == len(answer.parts[2]):
            return dict(zip(names, answer.parts[2], strict=True))
    return None


def _values_agree(reference: MathAnswer, answer: MathAnswer) -> bool:
    kinds = reference.kind, answer.kind
    if kinds == ("scalar", "scalar"):
        return _scalars_agree(reference, answer)
    if kinds in (("bracket", "bracket"), ("colon", "colon")):
        if kinds[0] == "bracket" and reference.parts[:2] != answer.parts[:2]:
            return False
        first, second = (a.parts[2] if a.kind == "bracket" else a.parts for a in (reference, answer))
        return _agree_in_order(first, second)
    if kinds == ("matrix", "matrix"):
        rows = reference.parts[1], answer.parts[1]
        cells = [[MathAnswer("scalar", (cell,)) for row in side for cell in row] for side in rows]
        is_shape_equal = [len(row) for row in rows[0]] == [len(row) for row in rows[1]]
        return reference.parts[0] == answer.parts[0] and is_shape_equal and _agree_in_order(*cells)
    if set(kinds) <= {"list", "set"}:
        return _collections_agree(reference, answer)
    for one, other in ((reference, answer), (answer, reference)):
        is_one_value = one.kind == "set" and len(one.parts[0]) == 1 and not _is_empty_symbol(one.parts[0][0])
        if is_one_value and other.kind == "scalar":
            return agree(one.parts[0][0], other)
        if one.kind == "words" and (other == MathAnswer("set", ((),)) or _is_empty_symbol(other)):
            return one.parts in _NOTHING
        if one.kind == "words" and one.parts in _ALL_REAL_NUMBERS:
            return read_region(other) == read_region(_REAL_LINE)
        if one == MathAnswer("set", ((),)) and _is_empty_symbol(other):
            return True
        if one.kind == "words" and len(one.parts) == 1 and all(token.kind == "symbol" for token in other.tokens):
            return bool("".join(token.text for token in other.tokens).casefold() == one.parts[0])  # east, \text{east}
    if kinds[0] == kinds[1] and kinds[0] in ("words", "dots"):
        return reference.parts == answer.parts
    if kinds in (("bracket", "scalar"), ("scalar", "bracket")):
        line = Expression("symbol", (r"\bb{R}",))
        is_line = any(a.kind == "scalar" and a.parts[0] == line for a in (reference, answer))
        return is_line and _regions_agree(reference, answer)
    for one, other in ((reference, answer), (answer, reference)):
        if (one.kind, other.kind) == ("list", "bracket"):
            return _regions_agree(reference, answer)  # x > 1 and x < 3
    if {"union", "difference"} & set(kinds):
        if kinds == ("union", "union") and _match_in_any_order(reference.parts, answer.parts):
            return True
        return _regions_agree(reference, answer)
    return False


def _is_empty_symbol(answer: MathAnswer) -> bool:
    return answer.kind == "scalar" and answer.parts[0] == Expression("symbol", ("empty",))


def _collections_agree(reference: MathAnswer, answer: MathAnswer) -> bool:
    reference, answer = _with_common_label(reference, answer), _with_common_label(answer, reference)
    if not answer.label and not any(item.label for item in answer.parts[0]):
        reference = _without_numbered_labels(reference)
    if not reference.label and not any(item.label for item in reference.parts[0]):
        answer = _without_numbered_labels(answer)
    first, second = reference.parts[0], answer.parts[0]
    if (_named_values(reference) is None) != (_named_values(answer) is None):
        return False  # x=1, y=2 is not 1, 2
    if any(item.kind == "dots" for item in (*first, *second)):
        return reference.kind == answer.kind and _agree_in_order(first, second)
    if reference.separator != answer.separator and any(item.kind in ("relation", "words") for item in first):
        return False
    if reference.kind == "set" or answer.kind == "set":
        return all(any(agree(a, b) for b in second) for a in first) and all(
            any(agree(a, b) for a in first) for b in second
        )
    return _match_in_any_order(first, second)


def _without_numbered_labels(answer: MathAnswer) -> MathAnswer:
    r"""Remove the labels of `x_1 = 2, x_2 = 3`: they number the values of one variable."""
    labels = [item.label for item in answer.parts[0]]
    is_numbered = all(
        len(label) >= 3 and label[1].text == "_" and label[-1 - (label[-1].text == "}")].text.isdigit()
        for label in labels
    )
    if len(labels) < 2 or not is_numbered or len({label[0] for label in labels}) > 1 or len(set(labels)) < len(labels):
        return answer
    return answer._replace(parts=(tuple(item._replace(label=()) for item in answer.parts[0]),))


def _with_common_label(numbered: MathAnswer, other: MathAnswer) -> MathAnswer:
    r"""Replace the labels of `x_1 = 2, x_2 = 3` by `x` if this is the label of the other list: `x = 2, 3`."""
    plain = _without_numbered_labels(numbered)
    if plain is numbered or len(other.label) != 1 or numbered.parts[0][0].label[:1] != other.label:
        return numbered
    return plain._replace(label=other.label)


def _agree_in_order(first: Sequence[MathAnswer], second: Sequence[MathAnswer]) -> bool:
    return len(first) == len(second) and all(agree(a, b) for a, b in zip(first, second, strict=True))


def _match_in_any_order(first: Sequence[MathAnswer], second: Sequence[MathAnswer]) -> bool:
    if len(first) != len(second):
        return False
    rest = list(second)
    for item in first:
        match = next((k for k, other in enumerate(rest) if agree(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


def _scalars_agree(reference: MathAnswer, answer: MathAnswer) -> bool:
    if reference.unit is None and answer.unit is not None:
        reference = _with_plain_unit(reference, answer)
    elif answer.unit is None and reference.unit is not None:
        answer = _with_plain_unit(answer, reference)
    first, second = reference.parts[0], answer.parts[0]
    if reference.unit is not None and answer.unit is not None and reference.unit != answer.unit:
        return False
    if reference.unit is None and _is_ambiguous_letter(answer):
        return False
    if is_word_of_capitals(reference.tokens) and not _has_letters_of(reference, answer):
        return False
    if are_equal_scalars(first, second):
        return True
    if (reference.unit == _PERCENT) == (answer.unit == _PERCENT):
        return False
    percent, other = (first, second) if reference.unit == _PERCENT else (second, first)
    return fraction_value(other) is not None and are_equal_scalars(Expression("multiply", (percent, _HUNDREDTH)), other)


def _has_letters_of(word: MathAnswer, answer: MathAnswer) -> bool:
    r"""Return True if an answer has the letters of a word like `TH` in their order: `HT` is another word."""
    return [token.text for token in answer.tokens if token.kind == "symbol"] == [token.text for token in word.tokens]


def _is_ambiguous_letter(answer: MathAnswer) -> bool:
    """Return True for a unit of one capital letter: `5 K` may be 5000, and `5 N` may be a product."""
    has_one_unit = answer.unit is not None and len(answer.unit) == 1
    return has_one_unit and len(answer.tokens[-1].text) == 1 and answer.tokens[-1].text.isupper()


def _with_plain_unit(answer: MathAnswer, other: MathAnswer) -> MathAnswer:
    """Read letters behind a number as a unit if the other answer has this unit: `5 m`, when the other is `7 m`."""
    tokens = list(answer.tokens)
    for position in range(1, len(tokens)):
        if tokens[position].kind not in ("symbol", "upright"):
            continue
        rest = [Token("upright", text) if kind == "symbol" else Token(kind, text) for kind, text in tokens[position:]]
        if read_unit(rest) == other.unit:
            try:
                return answer._replace(parts=(parse_expression(tokens[:position]),), unit=other.unit)
            except UnreadableError:
                return answer
    return answer


def _relations_agree(reference: MathAnswer, answer: MathAnswer) -> bool:
    if reference.label == answer.label or not (reference.label and answer.label):
        names = variable_of(reference), variable_of(answer)
        same_variable = reference.kind != answer.kind or names[0] == names[1]
        if same_variable and _regions_agree(reference, answer):
            return True
    first, second = _as_relation(reference), _as_relation(answer)
    if first is None or second is None:
        return False
    first, second = increasing_relation(*first), increasing_relation(*second)
    if len(first[0]) > 1 or len(second[0]) > 1:
        same_sides: Callable[[Any, Any], bool] = are_equal_scalars
        return first[0] == second[0] and all(map(same_sides, first[1], second[1]))
    (op_a,), (left_a, right_a) = first
    (op_b,), (left_b, right_b) = second
    is_order = op_a in ("<", "<=")
    return op_a == op_b and are_proportional(
        difference(left_a, right_a), difference(left_b, right_b), positive=is_order
    )


def _as_relation(answer: MathAnswer) -> tuple[tuple[str, ...], tuple[Expression, ...]] | None:
    if answer.kind == "relation":
        operators, sides = answer.parts
        return operators, sides
    if answer.kind == "scalar" and answer.label:
        try:
            name = parse_expression(answer.label)
        except UnreadableError:
            return None
        return (("=",), (name, answer.parts[0])) if depends_on(name) else None  # f(2) = 5 is no equation
    return None


def _regions_agree(reference: MathAnswer, answer: MathAnswer) -> bool:
    first, second = read_region(reference), read_region(answer)
    return first is not None and second is not None and are_equal_regions(first, second)
